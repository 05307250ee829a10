#include "modularbase/core/utf8.h"

#include <doctest/doctest.h>

#include <string>

using namespace modularbase;

TEST_CASE("well-formed sequences at the edges of every length are valid") {
  for (const char* text : {"", "a\x7f", "\xc2\x80\xdf\xbf", "\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80",
                           "\xf0\x90\x80\x80\xf4\x8f\xbf\xbf"}) {
    CHECK(is_valid_utf8(text));
  }
  CHECK(is_valid_utf8(std::string("a\0b", 3)));
}

TEST_CASE("what RFC 3629 forbids is invalid") {
  for (const char* text : {
           "\x80",              // a continuation alone
           "\xc1\xbf",          // overlong, two bytes
           "\xe0\x9f\xbf",      // overlong, three bytes
           "\xed\xa0\x80",      // a surrogate
           "\xf0\x8f\xbf\xbf",  // overlong, four bytes
           "\xf4\x90\x80\x80",  // above U+10FFFF
           "\xf5\x80\x80\x80",  // no such lead byte
           "\xe2\x82",          // cut short
           "\xe2\x28\xa1",      // a wrong second byte
           "ok\xff",
       }) {
    CHECK_FALSE(is_valid_utf8(text));
  }
}

TEST_CASE("printable keeps text, escapes the rest and cuts between characters") {
  CHECK(printable("Grün 🙂") == "Grün 🙂");
  CHECK(printable("a\x01\xe2\x82z\x7f") == "a\\x01\\xe2\\x82z\\x7f");
  CHECK(printable("ééé", 3) == "éé...");
  CHECK(printable("abc", 3) == "abc");
}
