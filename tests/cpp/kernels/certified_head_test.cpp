#include "modularbase/kernels/certified_head.h"

#include <doctest/doctest.h>
#include <ggml-cpu.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "modularbase/kernels/head_layout.h"
#include "modularbase/kernels/head_product.h"
#include "modularbase/kernels/head_scan.h"
#include "modularbase/kernels/linear.h"

using namespace modularbase;
using namespace modularbase::kernels;

namespace {

using Rng = std::mt19937;
constexpr float kInf = std::numeric_limits<float>::infinity();

/// A head in some type, its screen, and the numbers it was made from.
struct TestHead {
  std::vector<char> bytes;
  HeadWeight weight;
  std::unique_ptr<HeadScreen> screen;

  TestHead(ggml_type type, const std::vector<float>& values, std::int64_t n_embd,
           const float* gain = nullptr)
      : bytes(ggml_row_size(type, static_cast<std::int64_t>(values.size()))) {
    const auto n_vocab = static_cast<std::int64_t>(values.size()) / n_embd;
    ggml_cpu_init();
    if (type == GGML_TYPE_F32) {
      std::memcpy(bytes.data(), values.data(), bytes.size());
    } else {
      ggml_quantize_chunk(type, values.data(), bytes.data(), 0, n_vocab, n_embd, nullptr);
    }
    weight = {type, bytes.data(), n_embd, n_vocab, gain};
    screen = HeadScreen::build(weight, 2);
    REQUIRE(screen);
  }
};

std::vector<float> normal(Rng& rng, std::int64_t n, float sigma = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, sigma);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = distribution(rng);
  return values;
}

/// The logits of a row of x, computed without any of the certified head's code.
std::vector<float> full_product(const HeadWeight& head, const float* x) {
  std::vector<float> y(static_cast<std::size_t>(head.n_vocab));
  if (linear_supported(head.type)) {
    const LinearWeight weight{head.type, head.data, head.n_vocab};
    std::atomic<int> next{0};
    linear({&weight, 1, head.n_embd, 1, x, nullptr, y.data(), Epilogue::kNone, &next}, 0, 1);
    return y;
  }
  const auto* cpu = ggml_get_type_traits_cpu(head.type);
  std::vector<char> packed(ggml_row_size(cpu->vec_dot_type, head.n_embd));
  ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float(x, packed.data(), head.n_embd);
  const char* row = static_cast<const char*>(head.data);
  for (float& logit : y) {
    cpu->vec_dot(static_cast<int>(head.n_embd), &logit, 0, row, 0, packed.data(), 0, 1);
    row += ggml_row_size(head.type, head.n_embd);
  }
  return y;
}

void on_threads(int n_threads, const std::function<void(int, int)>& phase) {
  std::vector<std::jthread> threads;
  for (int ith = 1; ith < n_threads; ++ith) threads.emplace_back(phase, ith, n_threads);
  phase(0, n_threads);
}

void run(const TestHead& head, const std::vector<HeadQuery>& queries, const std::vector<float>& x,
         int n_threads, HeadWorkspace& workspace) {
  std::atomic<int> next{0};
  const CertifiedHeadArgs args{
      &head.weight, head.screen.get(), queries.data(), static_cast<std::int64_t>(queries.size()),
      x.data(),     &workspace,        &next};
  on_threads(n_threads, [&](int ith, int nth) { head_screen(args, ith, nth); });
  next = 0;
  on_threads(n_threads, [&](int ith, int nth) { head_refine(args, ith, nth); });
}

/// Says what is wrong with a certified answer; empty if nothing is.
std::string flaw(const HeadRow& row, const HeadQuery& query, const std::vector<float>& full) {
  if (row.ids.size() != row.logits.size()) return "ids and logits differ in length";
  std::vector<bool> listed(full.size(), false);
  for (std::size_t i = 0; i < row.ids.size(); ++i) {
    if (i > 0 && row.ids[i] <= row.ids[i - 1]) return "ids do not ascend";
    if (row.logits[i] != full[row.ids[i]])
      return "logit of " + std::to_string(row.ids[i]) + " is not exact";
    listed[row.ids[i]] = true;
  }
  std::vector<float> sorted = full;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const std::size_t kth = std::min<std::size_t>(std::max(query.top_k, 1), full.size()) - 1;
  for (std::size_t id = 0; id < full.size(); ++id) {
    const bool needed = full[id] >= sorted[kth] || full[id] >= sorted[0] - query.max_drop;
    if (needed && !listed[id]) return "token " + std::to_string(id) + " is missing";
  }
  for (TokenId id : query.forced) {
    if (!listed[id]) return "forced token " + std::to_string(id) + " is missing";
  }
  return "";
}

/// Runs the queries and checks every certified row against brute force; returns how many rows were
/// certified.
int check(const TestHead& head, const std::vector<HeadQuery>& queries, const std::vector<float>& x,
          int n_threads) {
  HeadWorkspacePtr workspace = make_head_workspace();
  run(head, queries, x, n_threads, *workspace);
  int n_certified = 0;
  for (std::size_t i = 0; i < queries.size(); ++i) {
    const HeadRow& row = head_rows(*workspace)[i];
    if (!row.certified) continue;
    ++n_certified;
    const std::vector<float> full = full_product(head.weight, x.data() + i * head.weight.n_embd);
    CHECK_EQ(flaw(row, queries[i], full), "");
  }
  return n_certified;
}

HeadQuery top(int top_k) {
  HeadQuery query;
  query.top_k = top_k;
  return query;
}

std::vector<HeadQuery> random_queries(Rng& rng, int n, std::int64_t n_vocab) {
  std::vector<HeadQuery> queries(static_cast<std::size_t>(n));
  for (HeadQuery& query : queries) {
    const int top_ks[] = {0, 1, 1, 2, 40, 200};
    query.top_k = top_ks[rng() % 6];
    query.max_drop = rng() % 2 ? 0.0f : static_cast<float>(rng() % 8);
    for (int i = static_cast<int>(rng() % 4); i > 0; --i) {
      query.forced.push_back(static_cast<TokenId>(rng() % static_cast<unsigned>(n_vocab)));
    }
  }
  return queries;
}

/// Every kind of trouble a head can bring, chosen by the generator.
std::vector<float> random_head(Rng& rng, std::int64_t n_embd, std::int64_t n_vocab) {
  std::vector<float> w = normal(rng, n_embd * n_vocab, 0.1f);
  const auto row = [&](std::int64_t i) { return w.begin() + i * n_embd; };
  const auto any_row = [&] {
    return static_cast<std::int64_t>(rng() % static_cast<unsigned>(n_vocab));
  };
  if (rng() % 2) {  // columns of very different size and mean
    for (int c = 0; c < 3; ++c) {
      const auto j = static_cast<std::int64_t>(rng() % static_cast<unsigned>(n_embd));
      for (std::int64_t i = 0; i < n_vocab; ++i)
        w[i * n_embd + j] = 30.0f * w[i * n_embd + j] + 5.0f;
    }
  }
  for (int i = static_cast<int>(rng() % 20); i > 0;
       --i) {  // duplicates and rows one rounding apart
    const std::int64_t from = any_row(), to = any_row();
    std::copy_n(row(from), n_embd, row(to));
    if (rng() % 2) row(to)[0] = std::nextafter(row(to)[0], kInf);
  }
  for (int i = static_cast<int>(rng() % 4); i > 0; --i) std::fill_n(row(any_row()), n_embd, 0.0f);
  if (rng() % 4 == 0) {  // one giant row, one giant weight
    std::for_each_n(row(any_row()), n_embd, [](float& v) { v *= 1000.0f; });
    row(any_row())[n_embd - 1] = 500.0f;
  }
  return w;
}

const ggml_type kTypes[] = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                            GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, GGML_TYPE_Q4_1};

std::int64_t random_embd(Rng& rng, ggml_type type) {
  const std::int64_t block = ggml_blck_size(type);
  const std::int64_t n = 1 + static_cast<std::int64_t>(rng() % 600);
  return (n + block - 1) / block * block;
}

}  // namespace

TEST_CASE("certified rows hold every token the query needs, with exact logits") {
  Rng rng(1);
  int n_certified = 0;
  for (int round = 0; round < 140; ++round) {
    const ggml_type type = kTypes[round % 7];
    const std::int64_t n_embd = random_embd(rng, type);
    const std::int64_t n_vocab = 1 + static_cast<std::int64_t>(rng() % 2500);
    const int n_rows = 1 + static_cast<int>(rng() % 6);
    const std::vector<float> gain = normal(rng, n_embd);
    CAPTURE(round);
    CAPTURE(ggml_type_name(type));
    const TestHead head(type, random_head(rng, n_embd, n_vocab), n_embd,
                        rng() % 2 ? gain.data() : nullptr);
    std::vector<float> x = normal(rng, n_embd * n_rows, 3.0f);
    for (int i = 0; i < 5; ++i) x[rng() % x.size()] *= 30.0f;
    n_certified += check(head, random_queries(rng, n_rows, n_vocab), x, 1 + round % 4);
  }
  CHECK(n_certified > 100);  // or the check above would say little
}

TEST_CASE("the upper bound holds for every token") {
  Rng rng(2);
  for (int round = 0; round < 42; ++round) {
    const ggml_type type = kTypes[round % 7];
    const std::int64_t n_embd = random_embd(rng, type);
    const std::int64_t n_vocab = 1 + static_cast<std::int64_t>(rng() % 500);
    const TestHead head(type, random_head(rng, n_embd, n_vocab), n_embd);
    const HeadScreen::Data& screen = head.screen->data();
    const std::vector<float> x = normal(rng, n_embd, 3.0f);
    std::vector<float> upper(screen.n_tiles * kTileRows), tile_max(screen.n_tiles);
    for (int n_planes : {1, 2}) {
      ScanRow row;
      prepare_scan_row(head.weight, screen, x.data(), n_planes, row);
      const ScanRow* rows[] = {&row};
      float* uppers[] = {upper.data()};
      float* maxima[] = {tile_max.data()};
      scan_tiles(screen, rows, 1, n_planes, 0, screen.n_tiles, uppers, maxima);
      const std::vector<float> full = full_product(head.weight, x.data());
      std::int64_t n_above = 0;
      for (std::int64_t id = 0; id < n_vocab; ++id)
        n_above += full[id] > upper[id] || upper[id] > tile_max[id / kTileRows];
      CHECK_EQ(n_above, 0);
    }
  }
}

TEST_CASE("a bound that is too small is caught") {
  Rng rng(3);
  const std::int64_t n_embd = 576, n_vocab = 4000;
  TestHead head(GGML_TYPE_F32, normal(rng, n_embd * n_vocab, 0.1f), n_embd);
  auto& screen = const_cast<HeadScreen::Data&>(head.screen->data());
  std::fill(screen.rest_residual.begin(), screen.rest_residual.end(), std::uint16_t{0});
  std::fill(screen.hot_residual.begin(), screen.hot_residual.end(), std::uint16_t{0});
  HeadWorkspacePtr workspace = make_head_workspace();
  int n_flaws = 0;
  for (int round = 0; round < 20; ++round) {
    const std::vector<float> x = normal(rng, n_embd, 3.0f);
    const std::vector<HeadQuery> queries{top(40)};
    run(head, queries, x, 1, *workspace);
    n_flaws +=
        !flaw(head_rows(*workspace)[0], queries[0], full_product(head.weight, x.data())).empty();
  }
  CHECK(n_flaws > 0);
}

TEST_CASE("every token that ties with the k-th largest is listed, however many there are") {
  Rng rng(9);
  const std::int64_t n_embd = 128, n_vocab = 4000;
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0}) {
    std::vector<float> w = normal(rng, n_embd * n_vocab, 0.1f);
    const std::vector<float> x = normal(rng, n_embd, 3.0f);
    // Four rows above all, then thirty equal ones: more than the probes of any k below.
    const auto toward_x = [&](std::int64_t id, float length) {
      for (std::int64_t j = 0; j < n_embd; ++j) w[id * n_embd + j] = length * x[j];
    };
    for (std::int64_t i = 0; i < 4; ++i) toward_x(1000 * i + 17, 0.2f + 0.01f * i);
    for (std::int64_t i = 0; i < 30; ++i) toward_x(131 * i, 0.1f);
    const TestHead head(type, w, n_embd);
    const std::vector<float> full = full_product(head.weight, x.data());
    REQUIRE(full[0] == full[131 * 29]);
    for (const int top_k : {1, 4, 5, 6, 34, 35}) {
      CAPTURE(top_k);
      HeadWorkspacePtr workspace = make_head_workspace();
      run(head, {top(top_k)}, x, 2, *workspace);
      const HeadRow& row = head_rows(*workspace)[0];
      REQUIRE(row.certified);
      CHECK_EQ(flaw(row, top(top_k), full), "");
      const bool reaches_ties = top_k > 4;
      if (reaches_ties) CHECK(std::binary_search(row.ids.begin(), row.ids.end(), 131 * 29));
    }
  }
}

TEST_CASE("a peaked distribution needs a short list") {
  Rng rng(4);
  const std::int64_t n_embd = 576, n_vocab = 8000;
  const std::vector<float> w = normal(rng, n_embd * n_vocab, 0.1f);
  const TestHead head(GGML_TYPE_F16, w, n_embd);
  std::vector<float> x = normal(rng, n_embd);
  for (std::int64_t j = 0; j < n_embd; ++j) x[j] += 3.0f * w[1234 * n_embd + j];
  HeadWorkspacePtr workspace = make_head_workspace();
  run(head, {HeadQuery{}}, x, 2, *workspace);
  const HeadRow& row = head_rows(*workspace)[0];
  REQUIRE(row.certified);
  CHECK_LT(row.ids.size(), 200);
  CHECK_EQ(flaw(row, {}, full_product(head.weight, x.data())), "");
}

TEST_CASE("answers do not depend on the threads or on the other rows") {
  Rng rng(5);
  const std::int64_t n_embd = 320, n_vocab = 3001;
  const TestHead head(GGML_TYPE_BF16, normal(rng, n_embd * n_vocab, 0.1f), n_embd);
  const std::vector<float> x = normal(rng, n_embd * 2, 3.0f);
  const std::vector<HeadQuery> queries(2, HeadQuery{.top_k = 10, .forced = {7, 3, 7}});
  HeadWorkspacePtr first = make_head_workspace(), second = make_head_workspace();
  run(head, queries, x, 1, *first);
  for (int n_threads = 2; n_threads <= 4; ++n_threads) {
    run(head, queries, x, n_threads, *second);
    for (int i = 0; i < 2; ++i) {
      CHECK(head_rows(*first)[i].certified == head_rows(*second)[i].certified);
      CHECK(head_rows(*first)[i].ids == head_rows(*second)[i].ids);
      CHECK(head_rows(*first)[i].logits == head_rows(*second)[i].logits);
    }
  }
  run(head, {queries[0]}, x, 3, *second);
  REQUIRE_EQ(head_rows(*second).size(), 1);
  CHECK(head_rows(*first)[0].ids == head_rows(*second)[0].ids);
  CHECK(head_rows(*first)[0].logits == head_rows(*second)[0].logits);
}

TEST_CASE("what cannot be bounded is not certified") {
  Rng rng(6);
  const std::int64_t n_embd = 256, n_vocab = 2048;
  const std::vector<float> w = normal(rng, n_embd * n_vocab, 0.1f);
  const TestHead head(GGML_TYPE_F32, w, n_embd);
  const std::vector<float> x = normal(rng, n_embd);
  CHECK_EQ(check(head, {HeadQuery{.all = true, .forced = {}}}, x, 1), 0);
  CHECK_EQ(check(head, {top(2000)}, x, 1), 0);
  CHECK_EQ(check(head, {HeadQuery{.max_drop = kInf, .forced = {}}}, x, 1), 0);
  CHECK_EQ(check(head, {HeadQuery{.forced = {2048}}}, x, 1), 0);
  CHECK_EQ(check(head, {HeadQuery{.forced = {-1}}}, x, 1), 0);
  for (float bad : {kInf, std::nanf(""), 3e38f}) {
    std::vector<float> bad_x = x;
    bad_x[17] = bad;
    CHECK_EQ(check(head, {HeadQuery{}}, bad_x, 2), 0);
  }
  const std::vector<float> equal(static_cast<std::size_t>(n_embd * n_vocab),
                                 0.25f);  // all tokens tie
  CHECK_EQ(check(TestHead(GGML_TYPE_F32, equal, n_embd), {HeadQuery{}}, x, 1), 0);
}

TEST_CASE("rows that cannot be bounded are always listed") {
  Rng rng(7);
  const std::int64_t n_embd = 256, n_vocab = 2048;
  std::vector<float> w = normal(rng, n_embd * n_vocab, 0.1f);
  w[100 * n_embd + 3] = 1e30f;  // its square overflows
  const TestHead head(GGML_TYPE_F32, w, n_embd);
  std::vector<float> x = normal(rng, n_embd, 3.0f);
  x[3] = std::abs(x[3]);
  CHECK_EQ(check(head, {HeadQuery{}}, x, 2), 1);
}

TEST_CASE("the screen knows what the product multiplies with") {
  Rng rng(8);
  const std::int64_t n_embd = 96;
  std::vector<float> one_hot(static_cast<std::size_t>(n_embd * n_embd), 0.0f);
  for (std::int64_t j = 0; j < n_embd; ++j) one_hot[j * n_embd + j] = 1.0f;
  const std::vector<float> x = normal(rng, n_embd, 3.0f);
  for (ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}) {
    const TestHead head(type, one_hot, n_embd);
    ProductInput input;
    prepare_product_input(head.weight, x.data(), input);
    CHECK(input.multiplied == full_product(head.weight, x.data()));
  }
}

TEST_CASE("types that ggml cannot multiply have no screen") {
  CHECK_FALSE(HeadScreen::build({GGML_TYPE_I32, nullptr, 32, 32}, 1));
  CHECK_FALSE(HeadScreen::build({GGML_TYPE_F32, nullptr, 32, 0}, 1));
}
