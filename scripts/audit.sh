#!/usr/bin/env bash
# Known vulnerabilities of the exact versions in constraints.txt, by pip-audit in an environment of
# its own. Exit code 1 where there are some; where no advisories can be had that is said, and is no
# failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=.venv-audit
[[ -x $environment/bin/pip-audit ]] || {
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet "pip-audit>=2.9,<3" || {
    echo "audit: pip-audit cannot be installed here; nothing was audited" >&2
    exit 0
  }
}
found=$(mktemp)
trap 'rm -f "$found"' EXIT
code=0
"$environment/bin/pip-audit" --requirement constraints.txt --no-deps --disable-pip \
  --progress-spinner off --format json --output "$found" >/dev/null 2>&1 || code=$?
"$environment/bin/python" - "$found" "$code" <<'PYTHON'
import json
import sys

text = open(sys.argv[1]).read()
rows = json.loads(text)["dependencies"] if text.strip() else []
asked = [row for row in rows if "skip_reason" not in row]
bad = [row for row in asked if row["vulns"]]
if not asked:
    sys.exit(print("audit: no advisories can be had here; nothing was audited", file=sys.stderr))
for row in bad:
    ids = ", ".join(one["id"] for one in row["vulns"])
    print(f"{row['name']} {row['version']}: {ids}", file=sys.stderr)
print(f"audit: {len(asked)} of {len(rows)} packages asked for, {len(bad)} with known vulnerabilities")
sys.exit(bool(bad))
PYTHON
