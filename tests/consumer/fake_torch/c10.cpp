#include <iostream>
#include <string>

void print(const std::string& text) { std::cout << text << '\n'; }
