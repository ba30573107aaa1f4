# debian_package.sh CPACK BUILD FOLDER: makes the .deb of a build, checks what it says and holds, unpacks it into FOLDER
set -e
rm -rf "$3"
mkdir -p "$3"
"$1" -G DEB --config "$2/CPackConfig.cmake" -B "$3/made" > "$3/cpack.log" 2>&1 || { cat "$3/cpack.log"; exit 1; }
package=$(echo "$3"/made/libheadroom-dev_*_all.deb)
dpkg-deb --info "$package" | grep -E 'Depends: libeigen3-dev'
dpkg-deb --contents "$package" > "$3/contents"
for file in include/headroom/core.hpp include/headroom/headroom.hpp share/cmake/headroom/headroomConfig.cmake \
  share/pkgconfig/headroom-core.pc share/doc/libheadroom-dev/copyright; do
  grep -q " ./usr/$file\$" "$3/contents" || { echo "$package lacks $file"; exit 1; }
done
dpkg-deb --extract "$package" "$3"
