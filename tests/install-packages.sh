#!/bin/sh
# Debian packages that the tests talk to for real: Prometheus with promtool, Chromium with its driver, a compiler for torch.compile.
set -eu
missing=""
command -v prometheus >/dev/null && command -v promtool >/dev/null || missing="prometheus"
command -v chromium >/dev/null && command -v chromedriver >/dev/null || missing="$missing chromium chromium-driver"
command -v g++ >/dev/null || missing="$missing g++"
[ -z "$missing" ] && exit 0
install="apt-get install -y --no-install-recommends $missing"
if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        install="sudo env DEBIAN_FRONTEND=noninteractive $install"
    else
        echo "make test needs$missing, which this user may not install: ask for '$install', or run make check" >&2
        exit 1
    fi
fi
echo "installing $missing"
sh -c "${install%%apt-get*}apt-get update -qq" >/dev/null 2>&1 || true
DEBIAN_FRONTEND=noninteractive sh -c "$install" >/dev/null
