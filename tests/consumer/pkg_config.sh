# pkg_config.sh COMPILER PREFIX SOURCE PROGRAM: compiles one file with what pkg-config knows of an installation, runs it
set -e
export PKG_CONFIG_PATH="$2/share/pkgconfig"
pkg-config --modversion headroom-core
"$1" -std=c++20 $(pkg-config --cflags headroom-core) "$3" -o "$4"
"$4"
