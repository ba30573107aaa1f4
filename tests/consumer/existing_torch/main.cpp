#include <iostream>

int main() { std::cout << TORCH << '\n'; }
