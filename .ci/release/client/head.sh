#!/bin/sh
# arcbridge @VERSION@, the client, for @PLATFORM@. Behind this script are its files (tar, gzip). The first start unpacks them
# into a directory of the user who starts it, later starts find them there. ARCBRIDGE_UNPACK_DIR names another directory.
name=arcbridge-@VERSION@-@DIGEST@
case $0 in /*) file=$0 ;; *) file=$PWD/$0 ;; esac

# A directory of this user alone: what is in it is run.
ours() { [ -d "$1" ] && [ -O "$1" ] && [ ! -h "$1" ]; }

unpack() (
    umask 077
    mkdir -p "$1" 2>/dev/null
    ours "$1" && chmod 700 "$1" || exit 1
    find "$1" -maxdepth 1 -name '.new-*' -mtime +0 -exec rm -rf {} + 2>/dev/null
    new=$1/.new-$$
    trap 'rm -rf "$new" "$1/$name/.new-$$"' EXIT
    trap 'exit 130' HUP INT TERM
    mkdir "$new" 2>/dev/null || exit 1
    tail -c +@OFFSET@ "$file" | tar -xzf - -C "$new" || exit 2
    # Another start may have been faster: then this directory lands in that one, and is removed.
    [ -d "$1/$name" ] || mv "$new" "$1/$name" 2>/dev/null
    ours "$1/$name" && [ -x "$1/$name/arcbridge" ] || exit 1
    # The version before this one may still run.
    ls -1dt "$1"/arcbridge-* 2>/dev/null | tail -n +3 | while read -r old; do
        if ours "$old" && [ -x "$old/arcbridge" ]; then rm -rf "$old"; fi
    done
)

tried=
for place in "${ARCBRIDGE_UNPACK_DIR:-}" "${XDG_CACHE_HOME:+$XDG_CACHE_HOME/arcbridge/program}" \
    "${HOME:+$HOME/.cache/arcbridge/program}" temporary; do
    case $place in
    /*) ;;
    temporary) place=${TMPDIR:-/tmp}/arcbridge-$(id -u) ;;
    *) continue ;;
    esac
    if ours "$place" && ours "$place/$name" && [ -x "$place/$name/arcbridge" ]; then
        found=yes
    else
        unpack "$place"
        case $? in
        0) found=yes ;;
        2)
            echo "error: $file is damaged or the disk of $place is full: see what tar says, or download it again" >&2
            exit 1
            ;;
        130) exit 130 ;;
        *) found= ;;
        esac
    fi
    if [ "$found" ]; then
        _ARCBRIDGE_PROGRAM=$file
        export _ARCBRIDGE_PROGRAM
        exec "$place/$name/arcbridge" "$@"
    fi
    tried="$tried${tried:+, }$place"
    [ "$place" != "${ARCBRIDGE_UNPACK_DIR:-}" ] || break
done
echo "error: cannot unpack into $tried: set ARCBRIDGE_UNPACK_DIR to a directory of yours from which programs may be run" >&2
exit 1
