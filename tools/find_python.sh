# find_python VERSION prints an interpreter of that version that runs and can make environments; pyenv's shims may exist
# and not run. Sourced by scripts that need one in particular; `missing_python` says where to get it.
find_python() {
    local candidate
    for candidate in "python$1" "$(pyenv root 2>/dev/null || true)"/versions/"$1".*/bin/"python$1"; do
        if "$candidate" -c 'import ensurepip' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

missing_python() {
    echo "error: no python$1 with ensurepip on PATH or among pyenv's versions; get one with one of" \
        "'apt-get install python$1 python$1-venv', 'pyenv install $1', 'uv python install $1'" >&2
}
