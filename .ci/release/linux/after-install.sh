#!/bin/sh
# dpkg: "configure", and the version before where there was one; rpm: how many versions are installed then.
set -e

users=/usr/lib/sysusers.d/arcbridge-@ROLE@.conf
if [ -e "$users" ]; then
    systemd-sysusers "$users"
    # As the unit makes them, but before the first start: `config check` as this user looks whether they can be written.
    install -d -o arcbridge -g arcbridge -m 0700 @STATE@
fi
unit=arcbridge-@ROLE@.service
settings=/etc/arcbridge/@ROLE@.toml

# By its path: root's PATH may have another arcbridge, as the client's single file. What the check reads the service may have
# written, so that it is bounded, and it runs as the service's user where that one exists beside the running service.
starts() (
    set -- timeout --kill-after=5 60 /usr/bin/arcbridge --role @ROLE@ config check --config "$settings"
    if [ -e "$users" ]; then
        exec runuser -u arcbridge -- "$@" >&2
    fi
    ulimit -v 4194304
    exec "$@" >&2
)

if [ "$1:$2" = configure: ] || [ "$1" = 1 ]; then
    echo "arcbridge-@ROLE@ is installed, and nothing runs yet: \`arcbridge --role @ROLE@ config init …\` fills $settings,"
    echo "\`arcbridge --role @ROLE@ config check --config $settings\` checks it, \`systemctl enable --now arcbridge-@ROLE@\` starts it."
elif [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    # What runs has lost its files. An agent is ready ("active") once a relay is: before that it runs as well, and nothing here
    # waits for it.
    case $(systemctl show --property=ActiveState --value "$unit") in
    inactive | failed | deactivating | "")
        # Installed anew, with the settings of before, or stopped for a removal that failed.
        if systemctl --quiet is-enabled "$unit"; then
            echo "arcbridge-@ROLE@ is enabled, and does not run: \`systemctl start arcbridge-@ROLE@\` starts it." >&2
        fi
        ;;
    *)
        if starts; then
            systemctl --no-block try-restart "$unit"
        else
            echo "arcbridge-@ROLE@: not restarted: this version's check of $settings failed or took over a minute. The version" >&2
            echo "before runs until it needs a file that is replaced: correct the settings now, then" >&2
            echo "\`systemctl restart arcbridge-@ROLE@\`." >&2
        fi
        ;;
    esac
fi
