#pragma once

#include <cstdint>

namespace modularbase {

using TokenId = std::int32_t;
using BlockId = std::int32_t;  // index into the KV block pool

}  // namespace modularbase
