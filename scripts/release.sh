#!/usr/bin/env bash
# Makes what a release consists of, from what is committed, and tries it out: build/releases/VERSION with the sources
# (headroom_core.hpp in them), the single header, the site, a Debian package and SHA256SUMS. Then the unpacked sources are
# configured, and the consumer tests install and use them. The same commit gives the same sources and the same header.
#
#   scripts/release.sh              all of it
#   scripts/release.sh --no-tests   without the consumer tests
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
tests=true
for option in "$@"; do
  case "$option" in
    --no-tests) tests=false ;;
    *)
      echo "release.sh: '$option' is no option; there is: --no-tests" >&2
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
cmake -S "$trial/$name" -B "$trial/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="${CMAKE_PREFIX_PATH:-$(echo "$PWD"/.venv/lib/python3*/site-packages/torch)}" > "$trial/configure.log"
(cd "$trial/build" && cpack -G DEB -B "$trial/package" > "$trial/cpack.log")
mv "$trial"/package/*.deb "$out"
if $tests; then
  ctest --test-dir "$trial/build" --output-on-failure -R '^consumer: '
fi
rm -rf "$trial"
(cd "$out" && sha256sum ./*.* | tee SHA256SUMS)
