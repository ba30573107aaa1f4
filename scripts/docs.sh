#!/usr/bin/env bash
# Makes the site build/docs/html: the chapters and the reference of every public name. A warning is an error, and so is
# a link that leads nowhere.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
command -v doxygen > /dev/null || scripts/setup.sh docs
rm -rf build/docs
doxygen docs/Doxyfile
python3 scripts/docs_links.py build/docs/html
echo "build/docs/html/index.html"
