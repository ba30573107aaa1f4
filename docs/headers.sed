# A header as Doxygen reads it (docs/Doxyfile). The inline namespace goes, which Doxygen 1.9 takes for the only one
s/headroom::inline v0/headroom/
s/::inline HEADROOM_[A-Z]+//
# <words> in comments are words, not HTML. What stands in code is left alone
/\/\/\/[^`]*$/s/<([A-Za-z][A-Za-z -]*)>/\&lt;\1\&gt;/g
