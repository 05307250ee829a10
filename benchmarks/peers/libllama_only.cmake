# The tests need libllama alone; llama.cpp's common library takes as long to compile.
set(LLAMA_BUILD_COMMON OFF)
# It only builds graphs and reads files; the arithmetic is ggml's, which keeps its own options.
cmake_language(DEFER CALL target_compile_options llama PRIVATE -O1)
