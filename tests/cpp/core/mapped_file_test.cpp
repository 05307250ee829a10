#include "modularbase/core/mapped_file.h"

#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#include "modularbase/core/errors.h"
#include "tools/temp_file.h"

using namespace modularbase;
using modularbase::testing::TempFile;

namespace {

std::string found_when_mapping(const std::string& path) {
  try {
    const MappedFile file(path);
  } catch (const BaseLoadError& error) {
    CHECK(error.file == path);
    return error.found;
  }
  return "no error";
}

}  // namespace

TEST_CASE("a mapped file shows the file's bytes and survives a move") {
  std::vector<std::byte> content(10000);
  for (std::size_t i = 0; i < content.size(); ++i) content[i] = static_cast<std::byte>(i * 7);
  const TempFile temp(content);
  MappedFile file(temp.path());
  const auto equals_content = [&](const MappedFile& f) {
    return std::vector(f.bytes().begin(), f.bytes().end()) == content;
  };
  CHECK(file.path() == temp.path());
  CHECK(equals_content(file));

  MappedFile moved(std::move(file));
  CHECK(equals_content(moved));
  const TempFile other_temp(std::vector<std::byte>(1));
  MappedFile other(other_temp.path());
  other = std::move(moved);
  CHECK(equals_content(other));
  CHECK(other.path() == temp.path());
}

TEST_CASE("advice of any range leaves the bytes as they are") {
  const std::vector<std::byte> content(20000, std::byte{42});
  const TempFile temp(content);
  const MappedFile file(temp.path());
  for (const std::size_t offset : {std::size_t{0}, std::size_t{1}, std::size_t{4096},
                                   std::size_t{19999}, std::size_t{20000}, SIZE_MAX}) {
    for (const std::size_t n_bytes :
         {std::size_t{0}, std::size_t{1}, std::size_t{9000}, SIZE_MAX}) {
      file.will_need(offset, n_bytes);
      file.release_pages(offset, n_bytes);
    }
  }
  CHECK(std::vector(file.bytes().begin(), file.bytes().end()) == content);
}

TEST_CASE("what cannot be mapped is a named error") {
  CHECK(found_when_mapping("/no/such/folder/file.gguf") == "No such file or directory");
  CHECK(found_when_mapping("") == "No such file or directory");
  CHECK(found_when_mapping("/") == "a directory");
  CHECK(found_when_mapping("/dev/null") == "a device");
  const TempFile empty({});
  CHECK(found_when_mapping(empty.path()) == "an empty file");
  CHECK(found_when_mapping(empty.path() + std::string("\0x", 2)) == "one");
}

TEST_CASE("a pipe is refused without waiting for a writer") {
  const TempFile name({});
  const std::string path = name.path() + ".pipe";
  REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
  CHECK(found_when_mapping(path) == "a pipe");
  ::unlink(path.c_str());
}
