# Compiler settings shared by every target, ggml's included where it says so.
find_program(MODULARBASE_CCACHE ccache DOC "Compiler cache; set it empty to do without")
if(MODULARBASE_CCACHE)
    foreach(language C CXX CUDA)
        if(NOT CMAKE_${language}_COMPILER_LAUNCHER)
            set(CMAKE_${language}_COMPILER_LAUNCHER ${MODULARBASE_CCACHE})
        endif()
    endforeach()
endif()

# Sanitizers apply to ggml too: a race or an overflow that crosses the border between us and it must be seen.
if(MODULARBASE_SANITIZE)
    add_compile_options(-fsanitize=${MODULARBASE_SANITIZE} -fno-omit-frame-pointer)
    add_link_options(-fsanitize=${MODULARBASE_SANITIZE})
endif()

add_library(modularbase_compile INTERFACE)
target_include_directories(modularbase_compile INTERFACE ${PROJECT_SOURCE_DIR}/cpp)
target_compile_options(modularbase_compile INTERFACE -Wall -Wextra -Wpedantic -Wshadow)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # GCC 12 finds an overlap in the string's own operator+ where there is none (GCC bug 105651).
    target_compile_options(modularbase_compile INTERFACE -Wno-restrict)
endif()
if(MODULARBASE_SANITIZE) # in our own code a finding is a failure
    target_compile_options(modularbase_compile INTERFACE -fno-sanitize-recover=all)
endif()
if(MODULARBASE_WERROR)
    target_compile_options(modularbase_compile INTERFACE -Werror)
endif()
if(MODULARBASE_NATIVE)
    target_compile_options(modularbase_compile INTERFACE -march=native)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_compile_options(modularbase_compile INTERFACE -march=x86-64-v3)
endif()

# modularbase_module(<name> SOURCES ... LINK ...): one static library a module. The link lines are the
# architecture: a module sees only what it links.
function(modularbase_module name)
    cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
    add_library(modularbase_${name} STATIC ${ARG_SOURCES})
    target_link_libraries(modularbase_${name} PUBLIC modularbase_compile ${ARG_LINK})
endfunction()
