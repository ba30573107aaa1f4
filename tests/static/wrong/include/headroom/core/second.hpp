#include <vector>

std::string needs_a_header();
inline bool asks_in_vain(double x) { return std::isnan(x); }
