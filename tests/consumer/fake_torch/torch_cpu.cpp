const char*& device() {
  static const char* name = "nothing";
  return name;
}
