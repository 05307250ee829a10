# ggml, pinned by third_party/ggml.lock and fetched by tools/fetch_ggml.py unless a local tree is named.
set(MODULARBASE_GGML_DIR "" CACHE PATH "A local ggml source tree to use instead of the pinned one")
set(ggml_dir ${MODULARBASE_GGML_DIR})
if(NOT ggml_dir)
  set(ggml_dir ${PROJECT_SOURCE_DIR}/third_party/ggml)
endif()

set(BUILD_SHARED_LIBS OFF CACHE BOOL "" FORCE)
set(GGML_NATIVE ${MODULARBASE_NATIVE} CACHE BOOL "" FORCE)
set(GGML_LLAMAFILE ON CACHE BOOL "" FORCE)  # off by default in standalone ggml
set(GGML_OPENMP OFF CACHE BOOL "" FORCE)    # ggml's own pool: persistent workers, no clash with torch's OpenMP
set(GGML_CCACHE OFF CACHE BOOL "" FORCE)
set(GGML_BUILD_TESTS OFF CACHE BOOL "" FORCE)
set(GGML_BUILD_EXAMPLES OFF CACHE BOOL "" FORCE)
add_subdirectory(${ggml_dir} ${PROJECT_BINARY_DIR}/ggml EXCLUDE_FROM_ALL SYSTEM)
