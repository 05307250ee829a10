// The certified head against the full product on a real model's head: same threads, interleaved,
// caches emptied before each timing (in a decoding step the other layers' weights do that), the
// fastest of a few rounds for each input, median over the inputs. Usage: head_bench MODEL.gguf
// HIDDEN.f32 [n_threads] [n_samples] HIDDEN.f32 holds rows of x [n_embd] after the output norm, as
// raw floats.
#include <ggml-cpu.h>
#include <gguf.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "modularbase/kernels/certified_head.h"
#include "modularbase/kernels/linear.h"

namespace {

using modularbase::HeadQuery;
using modularbase::TokenId;
namespace kernels = modularbase::kernels;
using Clock = std::chrono::steady_clock;

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

/// Threads that spin between jobs, as a graph's do between nodes.
class Team {
 public:
  explicit Team(int n) : n_(n) {
    for (int ith = 1; ith < n; ++ith) threads_.emplace_back([this, ith] { serve(ith); });
  }
  ~Team() {
    job_ = nullptr;
    epoch_.fetch_add(1);
  }
  void run(const std::function<void(int, int)>& job) {
    job_ = &job;
    n_left_.store(n_ - 1);
    epoch_.fetch_add(1);
    job(0, n_);
    while (n_left_.load() > 0) {
    }
  }

 private:
  void serve(int ith) {
    for (int seen = 0;;) {
      while (epoch_.load() == seen) {
      }
      ++seen;
      if (!job_) return;
      (*job_)(ith, n_);
      n_left_.fetch_sub(1);
    }
  }
  int n_;
  const std::function<void(int, int)>* job_ = nullptr;
  std::atomic<int> epoch_{0};
  std::atomic<int> n_left_{0};
  std::vector<std::jthread> threads_;
};

/// Reads more than any last-level cache holds.
void empty_caches(Team& team) {
  static std::vector<std::int64_t> block(std::size_t{12} << 20, 1);  // 96 MB
  static std::atomic<std::int64_t> sink{0};
  team.run([&](int ith, int nth) {
    std::int64_t sum = 0;
    for (std::size_t i = ith; i < block.size() / 8; i += nth) sum += block[8 * i];
    sink += sum;
  });
}

struct Model {
  std::int64_t n_embd = 0;
  std::int64_t n_vocab = 0;
  ggml_type type = GGML_TYPE_F32;
  std::vector<char> stored;
  std::vector<float> floats;
  std::vector<float> gain;
};

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "head_bench: %s\n", message.c_str());
  std::exit(1);
}

std::vector<float> to_floats(const ggml_tensor* tensor) {
  const std::int64_t n = ggml_nelements(tensor);
  const auto* data = static_cast<const float*>(tensor->data);
  if (tensor->type == GGML_TYPE_F32) return {data, data + n};
  std::vector<float> values(static_cast<std::size_t>(n));
  ggml_get_type_traits(tensor->type)->to_float(tensor->data, values.data(), n);
  return values;
}

Model load_model(const char* path) {
  ggml_context* tensors = nullptr;
  gguf_context* file = gguf_init_from_file(path, {.no_alloc = false, .ctx = &tensors});
  if (!file) fail(std::string("cannot read ") + path);
  const ggml_tensor* head = ggml_get_tensor(tensors, "output.weight");
  if (!head) head = ggml_get_tensor(tensors, "token_embd.weight");
  const ggml_tensor* gain = ggml_get_tensor(tensors, "output_norm.weight");
  if (!head || !gain) fail("no output head or output norm");
  Model model{head->ne[0], head->ne[1], head->type, {}, to_floats(head), to_floats(gain)};
  const auto* data = static_cast<const char*>(head->data);
  model.stored.assign(data, data + ggml_nbytes(head));
  ggml_free(tensors);
  gguf_free(file);
  return model;
}

std::vector<char> in_type(const Model& model, ggml_type type) {
  if (type == model.type) return model.stored;
  std::vector<char> bytes(ggml_row_size(type, model.n_embd) *
                          static_cast<std::size_t>(model.n_vocab));
  ggml_quantize_chunk(type, model.floats.data(), bytes.data(), 0, model.n_vocab, model.n_embd,
                      nullptr);
  return bytes;
}

std::vector<float> load_hidden(const char* path, std::int64_t n_embd) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) fail(std::string("cannot read ") + path);
  const auto n =
      static_cast<std::size_t>(file.tellg()) / sizeof(float) / static_cast<std::size_t>(n_embd);
  std::vector<float> rows(n * static_cast<std::size_t>(n_embd));
  file.seekg(0).read(reinterpret_cast<char*>(rows.data()),
                     static_cast<std::streamsize>(rows.size() * sizeof(float)));
  return rows;
}

/// y [n_vocab, n_rows]: linear() where it has the type, else ggml's vec_dot row by row.
void full_product(Team& team, const kernels::HeadWeight& head, const float* x, std::int64_t n_rows,
                  float* y) {
  std::atomic<int> next{0};
  if (kernels::linear_supported(head.type)) {
    const kernels::LinearWeight weight{head.type, head.data, head.n_vocab};
    team.run([&](int ith, int nth) {
      kernels::linear(
          {&weight, 1, head.n_embd, n_rows, x, nullptr, y, kernels::Epilogue::kNone, &next}, ith,
          nth);
    });
    return;
  }
  const auto* cpu = ggml_get_type_traits_cpu(head.type);
  const std::size_t w_bytes = ggml_row_size(head.type, head.n_embd);
  const std::size_t x_bytes = ggml_row_size(cpu->vec_dot_type, head.n_embd);
  std::vector<char> packed(x_bytes * static_cast<std::size_t>(n_rows));
  for (std::int64_t j = 0; j < n_rows; ++j) {
    ggml_get_type_traits_cpu(cpu->vec_dot_type)
        ->from_float(x + j * head.n_embd, packed.data() + j * x_bytes, head.n_embd);
  }
  constexpr std::int64_t kChunk = 64;
  team.run([&](int, int) {
    for (std::int64_t i; (i = next.fetch_add(1) * kChunk) < head.n_vocab;) {
      for (const std::int64_t end = std::min(i + kChunk, head.n_vocab); i < end; ++i) {
        const char* row = static_cast<const char*>(head.data) + i * w_bytes;
        for (std::int64_t j = 0; j < n_rows; ++j) {
          cpu->vec_dot(static_cast<int>(head.n_embd), y + j * head.n_vocab + i, 0, row, 0,
                       packed.data() + j * x_bytes, 0, 1);
        }
      }
    }
  });
}

constexpr int kRounds = 5;
constexpr double kNever = std::numeric_limits<double>::max();

struct Timing {
  double screen_us, refine_us, full_us;
};

/// Time of one phase. The caches are emptied before the screen only: what the refinement finds
/// there is its due.
template <class Phase>
double timed(Team& team, std::atomic<int>& next, bool empty, Phase phase) {
  if (empty) empty_caches(team);
  next = 0;
  const auto start = Clock::now();
  team.run(phase);
  return us_since(start);
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

/// Every token that the shortlist leaves out must be worse than the top_k-th of the full product;
/// those it has must agree.
bool agrees(const kernels::HeadRow& row, const HeadQuery& query, const float* full,
            std::int64_t n_vocab) {
  std::vector<float> sorted(full, full + n_vocab);
  std::nth_element(sorted.begin(), sorted.begin() + (query.top_k - 1), sorted.end(),
                   std::greater<>());
  std::size_t at = 0;
  for (std::int64_t id = 0; id < n_vocab; ++id) {
    if (at < row.ids.size() && row.ids[at] == id) {
      if (row.logits[at++] != full[id]) return false;
    } else if (full[id] >= sorted[query.top_k - 1]) {
      return false;
    }
  }
  return at == row.ids.size();
}

void bench(Team& team, const kernels::HeadWeight& head, const kernels::HeadScreen& screen,
           const std::vector<float>& hidden, std::int64_t n_rows, int top_k, int n_samples) {
  const auto n_hidden = static_cast<std::int64_t>(hidden.size()) / head.n_embd;
  kernels::HeadWorkspacePtr workspace = kernels::make_head_workspace();
  std::vector<HeadQuery> queries(static_cast<std::size_t>(n_rows));
  for (HeadQuery& query : queries) query.top_k = top_k;
  std::vector<float> full(static_cast<std::size_t>(n_rows * head.n_vocab));
  std::vector<double> screen_us, refine_us, full_us, n_ids;
  std::int64_t n_answers = 0, n_fallback = 0, n_wrong = 0;
  for (int sample = 0; sample < n_samples; ++sample) {
    const std::int64_t first = sample * (n_hidden - n_rows) / n_samples;
    const float* x = hidden.data() + first * head.n_embd;
    std::atomic<int> next{0};
    const kernels::CertifiedHeadArgs args{&head, &screen,         queries.data(), n_rows,
                                          x,     workspace.get(), &next};
    Timing best{kNever, kNever, kNever};
    for (int round = 0; round < kRounds; ++round) {
      best.screen_us =
          std::min(best.screen_us,
                   timed(team, next, true, [&](int ith, int nth) { head_screen(args, ith, nth); }));
      best.refine_us = std::min(best.refine_us, timed(team, next, false, [&](int ith, int nth) {
                                  head_refine(args, ith, nth);
                                }));
      empty_caches(team);
      const auto start = Clock::now();
      full_product(team, head, x, n_rows, full.data());
      best.full_us = std::min(best.full_us, us_since(start));
    }
    screen_us.push_back(best.screen_us);
    refine_us.push_back(best.refine_us);
    full_us.push_back(best.full_us);
    for (std::int64_t j = 0; j < n_rows; ++j, ++n_answers) {
      const kernels::HeadRow& row = kernels::head_rows(*workspace)[j];
      n_fallback += !row.certified;
      n_ids.push_back(static_cast<double>(row.ids.size()));
      if (row.certified && !agrees(row, queries[j], full.data() + j * head.n_vocab, head.n_vocab))
        ++n_wrong;
    }
  }
  double mean_ids = 0.0;
  for (double n : n_ids) mean_ids += n / static_cast<double>(n_ids.size());
  const double row_bytes = static_cast<double>(ggml_row_size(head.type, head.n_embd));
  const double ours = median(screen_us) + median(refine_us);
  std::printf(
      "%-5s rows %2d top_k %2d | ids mean %6.0f | MB/step %5.1f of %5.1f | screen %6.0f refine "
      "%5.0f us, full %6.0f us, "
      "%.2fx | fallback %.2f %% wrong %d\n",
      ggml_type_name(head.type), static_cast<int>(n_rows), top_k, mean_ids,
      (static_cast<double>(screen.n_bytes()) + mean_ids * n_rows * row_bytes) / 1e6,
      row_bytes * head.n_vocab / 1e6, median(screen_us), median(refine_us), median(full_us),
      median(full_us) / ours, 100.0 * n_fallback / n_answers, static_cast<int>(n_wrong));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) fail("usage: head_bench MODEL.gguf HIDDEN.f32 [n_threads] [n_samples]");
  const int n_threads = argc > 3 ? std::atoi(argv[3]) : 2;
  const int n_samples = argc > 4 ? std::atoi(argv[4]) : 100;
  const Model model = load_model(argv[1]);
  const std::vector<float> hidden = load_hidden(argv[2], model.n_embd);
  ggml_cpu_init();
  Team team(n_threads);
  for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0}) {
    const std::vector<char> bytes = in_type(model, type);
    const kernels::HeadWeight head{type, bytes.data(), model.n_embd, model.n_vocab,
                                   model.gain.data()};
    double build_us = std::numeric_limits<double>::max();
    std::unique_ptr<kernels::HeadScreen> screen;
    for (int i = 0; i < 5; ++i) {
      screen.reset();
      const auto start = Clock::now();
      screen = kernels::HeadScreen::build(head, n_threads);
      build_us = std::min(build_us, us_since(start));
    }
    std::printf("%s: screen of %.1f MB built in %.1f ms (best of 5)\n", ggml_type_name(type),
                screen->n_bytes() / 1e6, build_us / 1e3);
    for (std::int64_t n_rows : {1, 8}) {
      for (int top_k : {1, 40}) bench(team, head, *screen, hidden, n_rows, top_k, n_samples);
    }
  }
}
