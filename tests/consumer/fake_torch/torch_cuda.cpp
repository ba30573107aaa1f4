const char*& device();

static const bool registered = (device() = "cuda", true);
