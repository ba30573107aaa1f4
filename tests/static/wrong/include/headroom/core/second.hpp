#include <vector>

std::string needs_a_header();
