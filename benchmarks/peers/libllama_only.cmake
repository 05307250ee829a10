# The tests need libllama alone; llama.cpp's common library takes as long to compile.
set(LLAMA_BUILD_COMMON OFF)
