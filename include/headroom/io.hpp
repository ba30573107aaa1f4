#pragma once

#include "headroom/io/atomic_file.hpp"
#include "headroom/io/descriptor.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/io/folder_lock.hpp"
#include "headroom/io/input_file.hpp"
#include "headroom/io/line_file.hpp"
#include "headroom/io/nearest.hpp"
#include "headroom/io/number.hpp"
#include "headroom/io/process.hpp"
#include "headroom/io/room.hpp"
#include "headroom/io/temporary_folder.hpp"
