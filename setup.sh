#!/usr/bin/env bash
# Makes .venv with everything that requirements.txt pins. Run again, it finds that done within a second.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
stamp=.venv/.installed

fail() { echo "error: $*" >&2; exit 2; }

# What is missing is found by trying it, not by asking dpkg: Python or OpenCV may come from elsewhere.
missing_packages() {
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    pkg-config --exists libjpeg 2>/dev/null || echo libjpeg-dev
    pkg-config --exists libdeflate 2>/dev/null || echo libdeflate-dev
    command -v "$python" >/dev/null || { echo python3 python3-dev python3-venv; return; }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || echo python3-dev
}

# Only tests need these, a real Slurm, two hosts out of network namespaces, and a browser that looks at the pages: without
# them those are skipped.
missing_for_tests() {
    local PATH=$PATH:/usr/sbin:/sbin
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null || echo slurm-wlm
    command -v munged >/dev/null || echo munge
    command -v ip >/dev/null || echo iproute2
    command -v strace >/dev/null || echo strace
    command -v chromium >/dev/null || echo chromium
}

install_packages() {
    local missing for_tests as_root=() refusal=
    missing=$(missing_packages)
    missing=${missing//$'\n'/ }
    for_tests=$(missing_for_tests)
    for_tests=${for_tests//$'\n'/ }
    [ -n "$missing$for_tests" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        as_root=(sudo)
        sudo -n true 2>/dev/null || refusal="these Debian packages are missing and this user may not install them. \
Ask an administrator for: apt-get install"
    fi
    command -v apt-get >/dev/null || refusal="these packages are missing (by Debian's names):"
    if [ -n "$refusal" ]; then
        [ -z "$missing" ] || fail "$refusal $missing"
        echo "SOME TESTS ARE SKIPPED: $refusal $for_tests" >&2
        return 0
    fi
    echo "installing Debian packages: $missing $for_tests"
    "${as_root[@]}" apt-get update -qq
    # shellcheck disable=SC2086  # a list of names
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        $missing $for_tests >/dev/null
    missing=$(missing_packages)
    [ -z "$missing" ] || fail "still missing after apt-get: $missing"
}

# Compiles a shared library anew where a source is newer: build_library LIBRARY COMPILER "LIBRARIES TO LINK" SOURCE...
build_library() {
    local library=$1 compiler=$2 linked=$3 source stale=
    shift 3
    for source; do [ "$source" -nt "$library" ] && stale=1; done
    [ -n "$stale" ] || return 0
    # shellcheck disable=SC2086  # a list of options
    "$compiler" -O2 -std=c11 -shared -fPIC -o "$library.tmp" "$@" $linked
    mv "$library.tmp" "$library"
}

# Checking JPEGs and reducing pictures, for shards: without it Python does both, ten times slower and more. In a library
# apart, since it needs libjpeg: rewriting JPEGs with restart markers.
build_native() {
    local folder=data_prep/csrc compiler
    [ -d "$folder" ] || return 0
    compiler=$(command -v "${CC:-cc}" || command -v gcc || true)
    if [ -z "$compiler" ]; then
        [ -e "$folder/libdata_prep.so" ] && [ -e "$folder/libdata_prep_jpeg.so" ] && return 0
        echo "NO C COMPILER: Python checks JPEGs, at 100 us each instead of 10, and reduces pictures, at 15 ms;" \
            "shard --restart-markers is refused" >&2
        return 0
    fi
    build_library "$folder/libdata_prep.so" "$compiler" "" "$folder/jpeg_check.c" "$folder/area_resize.c"
    if ! echo | "$compiler" -fsyntax-only -include stdio.h -include jpeglib.h -x c - 2>/dev/null; then
        echo "NO HEADERS OF libjpeg (Debian's libjpeg-dev): shard --restart-markers is refused" >&2
        return 0
    fi
    build_library "$folder/libdata_prep_jpeg.so" "$compiler" -ljpeg "$folder/jpeg_restart.c"
}

# The noise kernels: C++ everywhere, CUDA where nvcc is found, whether or not a GPU is in sight.
build_kernels() {
    if ! command -v g++ >/dev/null || ! command -v make >/dev/null; then
        echo "NO C++ COMPILER (or no make): noise is plain PyTorch, some 30 times slower" >&2
        return 0
    fi
    make --silent -j2 -C pipeline/noise/csrc PYTHON="$PWD/.venv/bin/python"
}

# Reading pictures by native threads.
build_loader() {
    if ! command -v g++ >/dev/null || ! command -v make >/dev/null; then
        echo "NO C++ COMPILER (or no make): Pillow reads pictures, several times slower" >&2
        return 0
    fi
    make --silent -j2 -C pipeline/data/csrc
}

wanted() { cat requirements.txt; "$python" -c 'import sys; print(sys.version)'; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted | sha256sum)" ]; then
    build_native
    build_loader
    build_kernels
    exit 0
fi
install_packages
build_native
build_loader
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$python is $("$python" --version): Python 3.11 or later is needed (PYTHON=/path/to/python3.11 make setup)"
echo "installing requirements.txt into .venv (a few minutes, about 7 GB)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
wanted | sha256sum > "$stamp"
build_kernels
