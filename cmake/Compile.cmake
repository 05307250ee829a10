# Compiler settings shared by every target of ours. Sanitizers apply to ggml too: a race or an overflow
# that crosses the border between us and it must be seen.
if(MODULARBASE_SANITIZE)
  add_compile_options(-fsanitize=${MODULARBASE_SANITIZE} -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${MODULARBASE_SANITIZE})
endif()

add_library(modularbase_compile INTERFACE)
target_include_directories(modularbase_compile INTERFACE ${PROJECT_SOURCE_DIR}/cpp)
target_compile_options(modularbase_compile INTERFACE -Wall -Wextra -Wpedantic -Wshadow)
if(MODULARBASE_WERROR)
  target_compile_options(modularbase_compile INTERFACE -Werror)
endif()
if(MODULARBASE_NATIVE)
  target_compile_options(modularbase_compile INTERFACE -march=native)
endif()

# modularbase_module(<name> SOURCES ... LINK ...): one static library a module. The link lines are the
# architecture: a module sees only what it links.
function(modularbase_module name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_library(modularbase_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(modularbase_${name} PUBLIC modularbase_compile ${ARG_LINK})
endfunction()
