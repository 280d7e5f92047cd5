#!/bin/sh
# dpkg: "remove" (or "upgrade"); rpm: how many versions are left then.
set -e

if [ "$1" = remove ] || [ "$1" = 0 ]; then
    unit=arcbridge-@ROLE@.service
    if [ -d /run/systemd/system ]; then
        systemctl --quiet stop "$unit"
    fi
    systemctl --quiet disable "$unit" || true
fi
