#!/bin/sh
# dpkg: "configure", and the version before where there was one; rpm: how many versions are installed then.
set -e

users=/usr/lib/sysusers.d/arcbridge-@ROLE@.conf
if [ -e "$users" ]; then
    systemd-sysusers "$users"
fi
unit=arcbridge-@ROLE@.service
settings=/etc/arcbridge/@ROLE@.toml
if [ "$1:$2" = configure: ] || [ "$1" = 1 ]; then
    echo "arcbridge-@ROLE@ is installed, and nothing runs yet: \`arcbridge --role @ROLE@ config init …\` fills $settings,"
    echo "\`arcbridge --role @ROLE@ config check --config $settings\` checks it, \`systemctl enable --now arcbridge-@ROLE@\` starts it."
elif [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    # What runs has lost its files. An agent is ready once a relay is, so nothing here waits for it.
    if ! systemctl --quiet is-active "$unit"; then
        :
    elif arcbridge --role @ROLE@ config check --config "$settings" >&2; then
        systemctl --no-block try-restart "$unit"
    else
        echo "arcbridge-@ROLE@: not restarted: this version does not start with $settings. The version before runs until" >&2
        echo "it is corrected and \`systemctl restart arcbridge-@ROLE@\` is called." >&2
    fi
fi
