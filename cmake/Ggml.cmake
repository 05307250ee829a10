# ggml, pinned by third_party/ggml.lock and fetched by tools/fetch_ggml.py unless a local tree is named.
set(MODULARBASE_GGML_DIR "" CACHE PATH "A local ggml source tree to use instead of the pinned one")

# Leaves the pinned tree in `dir`. Python is needed only when it is not there yet.
function(modularbase_fetch_ggml dir)
    set(lock ${PROJECT_SOURCE_DIR}/third_party/ggml.lock)
    set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${lock})
    file(STRINGS ${lock} pinned REGEX "^sha256 = ")
    if(EXISTS ${dir}/.fetched)
        file(STRINGS ${dir}/.fetched fetched)
        if(pinned STREQUAL "sha256 = ${fetched}")
            return()
        endif()
    endif()
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
    set(script ${PROJECT_SOURCE_DIR}/tools/fetch_ggml.py)
    execute_process(COMMAND ${Python_EXECUTABLE} ${script} --into ${dir} RESULT_VARIABLE failed)
    if(failed)
        message(
            FATAL_ERROR
            "The pinned ggml could not be obtained; see the error above. Another way: name a ggml source tree of "
            "your own with -DMODULARBASE_GGML_DIR=/path/to/ggml"
        )
    endif()
endfunction()

if(MODULARBASE_GGML_DIR)
    set(ggml_dir ${MODULARBASE_GGML_DIR})
    if(NOT EXISTS ${ggml_dir}/include/ggml.h)
        message(FATAL_ERROR "MODULARBASE_GGML_DIR: expected a ggml source tree, found ${ggml_dir}")
    endif()
else()
    set(ggml_dir ${PROJECT_SOURCE_DIR}/third_party/ggml)
    modularbase_fetch_ggml(${ggml_dir})
endif()

set(BUILD_SHARED_LIBS OFF CACHE BOOL "" FORCE)
set(GGML_NATIVE ${MODULARBASE_NATIVE} CACHE BOOL "" FORCE)
set(GGML_LLAMAFILE ON CACHE BOOL "" FORCE) # off by default in standalone ggml
set(GGML_OPENMP OFF CACHE BOOL "" FORCE) # ggml's own pool: persistent workers, no clash with torch's OpenMP
set(GGML_ALL_WARNINGS OFF CACHE BOOL "" FORCE) # GCC 12 warns inside its own AVX-512 headers
set(GGML_CCACHE OFF CACHE BOOL "" FORCE) # Compile.cmake decides for all targets
set(GGML_BUILD_TESTS OFF CACHE BOOL "" FORCE)
set(GGML_BUILD_EXAMPLES OFF CACHE BOOL "" FORCE)
if(NOT MODULARBASE_NATIVE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(x86_64_v3
        SSE42
        AVX
        AVX2
        BMI2
        FMA
        F16C
    ) # what Compile.cmake asks for in our own code
    foreach(feature IN LISTS x86_64_v3)
        set(GGML_${feature} ON CACHE BOOL "" FORCE)
    endforeach()
endif()
set(GIT_EXE "" CACHE INTERNAL "Unset: ggml would take our repository's commit for its own")
add_subdirectory(${ggml_dir} ${PROJECT_BINARY_DIR}/ggml EXCLUDE_FROM_ALL SYSTEM)
