# Makes .venv with the tested set, or reuses it, and sets $python. Sourced: source tools/environment.sh EXTRAS
# VENV names another folder than .venv, PYTHON another interpreter than python3.
# A stamp of what was installed spares the next call the minute that pip needs to find that nothing is to be done.
venv=${VENV:-.venv}
python=$venv/bin/python
wanted=$(cat setup.py constraints.txt <(echo "$1") | cksum)
if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: ${PYTHON:-python3} is older than 3.11; set PYTHON to a newer one" >&2
        exit 2
    }
    echo "making $venv"
    "${PYTHON:-python3}" -m venv "$venv"
fi
if ! grep -qxF "$wanted" "$venv/installed" 2>/dev/null; then
    echo "installing megatron_powerflow[$1] into $venv"
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
    echo "$wanted" >> "$venv/installed"
fi
