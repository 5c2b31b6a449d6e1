#!/bin/sh
# Prometheus and promtool from the distribution; the tests that talk to a real server need them.
set -eu
command -v prometheus >/dev/null && command -v promtool >/dev/null && exit 0
install="apt-get install -y --no-install-recommends prometheus"
if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        install="sudo $install"
    else
        echo "make test needs prometheus and promtool, and this user may not install them: ask for '$install'" >&2
        exit 1
    fi
fi
echo "installing prometheus (about 10 s)"
apt-get update -qq >/dev/null 2>&1 || true
DEBIAN_FRONTEND=noninteractive $install >/dev/null
