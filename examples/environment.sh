# Makes or completes the virtual environment that the examples and the tests run in; source it from the repository's root.
#   make_environment EXTRAS   e.g. make_environment examples,deepspeed
# PYTHON chooses the interpreter (3.11 to 3.13), VENV the folder (.venv).

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13; do
    if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "no Python 3.11, 3.12 or 3.13 found; set PYTHON to one" >&2
  return 1
}

make_environment() {
  VENV=${VENV:-.venv}
  if [ ! -x "$VENV/bin/python" ]; then
    local python
    python=$(find_python) || return 1
    "$python" -m venv "$VENV"
  fi
  local wanted
  wanted=$(cat setup.py constraints.txt | cksum)-$1
  if [ "$(cat "$VENV/.ta_plugin" 2>/dev/null)" != "$wanted" ]; then  # nothing to do when nothing changed
    echo "installing torch, ta_plugin and its extras ($1) into $VENV" >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
    echo "$wanted" > "$VENV/.ta_plugin"
  fi
}
