# conan.sh CONAN SOURCE FOLDER: makes the Conan package of core and builds a program with it. Eigen is the system's: no
# other packages are fetched.
set -e
rm -rf "$3"
mkdir -p "$3"
export CONAN_HOME="$3/home"
"$1" profile detect > "$3/log" 2>&1
printf 'include(default)\n[platform_requires]\neigen/3.4.0\n' > "$3/profile"
"$1" create "$2/packaging/conan" --profile:all "$3/profile" --no-remote \
  --conf "tools.cmake.cmake_layout:test_folder=$3/test" \
  --conf tools.cmake.cmaketoolchain:user_presets= 2>&1
