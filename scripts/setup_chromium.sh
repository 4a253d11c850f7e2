#!/usr/bin/env bash
# Makes .chromium/bin/chromium: a headless Chromium for the tests of the report's page, from Debian's
# packages, unpacked beside the project: no root is needed and the system stays as it is. Where
# there is a browser already, that is taken. Prints the program's path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root="$PWD/.chromium"
stamp="$root/.stamp"
program="$root/bin/chromium"
wanted="$(sha256sum < scripts/setup_chromium.sh | cut -d' ' -f1)"
for found in chromium chromium-headless-shell google-chrome; do
  if command -v "$found"; then exit 0; fi
done
if [[ -f $stamp && "$(cat "$stamp")" == "$wanted" ]]; then
  echo "$program"
  exit 0
fi
for tool in apt-get dpkg-deb; do
  command -v "$tool" >/dev/null || {
    echo "setup: no $tool: install Chromium or Chrome by what this system has" >&2
    exit 2
  }
done

mkdir -p "$root/bin" "$root/lists/partial" "$root/debs" "$root/files"
apt=(apt-get -qq -o "Dir::State::Lists=$root/lists" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache="
  -o "APT::Sandbox::User=$(id -un)")
echo "setup: fetching a headless Chromium (60 MB)" >&2
"${apt[@]}" update >&2
# The package, and of its dependencies those that this system lacks.
mapfile -t packages < <("${apt[@]}" -s -o Debug::NoLocking=1 install --no-install-recommends \
  chromium-headless-shell fonts-dejavu-core | awk '$1 == "Inst" {print $2}')
(cd "$root/debs" && "${apt[@]}" download "${packages[@]}" >&2)
for file in "$root"/debs/*.deb; do dpkg-deb -x "$file" "$root/files"; done
rm -r "$root/debs" "$root/lists"

shell="$(find "$root/files/usr/lib" -type f -name chromium-headless-shell | head -n 1)"
libraries="$(find "$root/files" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)"
cat >"$program" <<SH
#!/bin/sh
export LD_LIBRARY_PATH="$libraries" XDG_DATA_HOME="$root/files/usr/share"
[ -e /etc/fonts/fonts.conf ] || export FONTCONFIG_PATH="$root/files/etc/fonts"
exec "$shell" "\$@"
SH
chmod +x "$program"
"$program" --no-sandbox --version >&2
echo "$wanted" >"$stamp"
echo "$program"
