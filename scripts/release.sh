#!/usr/bin/env bash
# Makes what a release consists of, from what is committed, and tries it out: build/releases/VERSION with the sources
# (headroom_core.hpp in them), the single header, the site, Debian packages (of headers, and with the kernels compiled
# for this architecture), a Python wheel and SHA256SUMS. Then the unpacked sources are configured, and the consumer
# tests install and use them. The same commit gives the same sources and the same header.
#
#   scripts/release.sh                all of it
#   scripts/release.sh --no-tests     without the consumer tests
#   scripts/release.sh --clean-root   also what docs/010_getting_started.md begins with, in a fresh Debian 12; needs
#                                     debootstrap, and root
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
tests=true clean_root=false
for option in "$@"; do
  case "$option" in
    --no-tests) tests=false ;;
    --clean-root) clean_root=true ;;
    *)
      echo "release.sh: '$option' is no option; there are: --no-tests, --clean-root" >&2
      exit 2
      ;;
  esac
done
if [ -n "$(git status --porcelain)" ]; then
  echo "release.sh: the work tree has changes that are not committed; commit them or put them away" >&2
  exit 1
fi
version=$(sed -n 's/^project(headroom VERSION \([^ ]*\).*/\1/p' CMakeLists.txt)
grep -q "^## $version" CHANGELOG.md || { echo "release.sh: CHANGELOG.md says nothing of $version" >&2; exit 1; }

name=headroom-$version
out=$PWD/build/releases/$version
rm -rf "$out"
mkdir -p "$out"
scripts/single_header.py "$out/headroom_core.hpp"
git archive --prefix="$name/single_include/" --add-file="$out/headroom_core.hpp" \
  --prefix="$name/" --format=tar HEAD | gzip -n9 > "$out/$name.tar.gz"
scripts/docs.sh
tar -C build/docs -czf "$out/$name-docs.tar.gz" html

# From here on only the tarball is used
trial=$out/trial
mkdir -p "$trial"
tar -C "$trial" -xzf "$out/$name.tar.gz"
python=$PWD/.venv/bin/python3
# Kernels are compiled once: with one name of the compiler, which ccache takes into account and Python has another of
if command -v ccache > /dev/null; then export CMAKE_CXX_COMPILER_LAUNCHER=ccache; fi
export CXX=${CXX:-c++}
# make_package BUILD [OPTION...]: configures the unpacked sources, compiles the kernels, makes the Debian package
make_package() {
  local folder=$trial/$name/build/$1
  shift
  cmake -S "$trial/$name" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release "-DHEADROOM_VENV_PYTHON=$python" \
    "-DCMAKE_PREFIX_PATH=${CMAKE_PREFIX_PATH:-$(echo "$PWD"/.venv/lib/python3*/site-packages/torch)}" "$@"
  cmake --build "$folder" --parallel "${HEADROOM_JOBS:-$(nproc)}" --target headroom_compiled_kernels
  (cd "$folder" && cpack -G DEB -B "$folder/package")
  mv "$folder"/package/*.deb "$out"
}
make_package release
make_package with_kernels "-DHEADROOM_COMPONENTS=core;kernels;headroom;training" -DHEADROOM_BUILD_TESTS=OFF \
  -DHEADROOM_BUILD_EXAMPLES=OFF -DHEADROOM_BUILD_BENCHMARKS=OFF -DHEADROOM_BUILD_PYTHON=OFF
"$python" -m pip wheel "$trial/$name" --quiet --no-build-isolation --no-deps --wheel-dir "$out"
if $tests; then
  ctest --test-dir "$trial/$name/build/release" --output-on-failure -R '^consumer: '
fi
if $clean_root; then
  debootstrap --variant=minbase --include=ca-certificates bookworm "$trial/root" > "$trial/debootstrap.log"
  cp /etc/ssl/certs/ca-certificates.crt "$trial/root/etc/ssl/certs"  # pip there trusts whom it does here
  chroot "$trial/root" apt-get --quiet --quiet update
  # What compiles here, such as ccache, is not there
  env -u CMAKE_CXX_COMPILER_LAUNCHER -u CXX python3 "$trial/$name/tests/consumer/first_steps.py" \
    "$trial/$name/docs/010_getting_started.md" \
    "$(echo "$out"/libheadroom-dev_*_"$(dpkg --print-architecture)".deb)" --root "$trial/root"
fi
rm -rf "$trial"
(cd "$out" && sha256sum ./*.* | tee SHA256SUMS)
