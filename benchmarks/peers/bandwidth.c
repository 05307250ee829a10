/* Reads memory with N threads and prints the rate in bytes per second, best of several passes.
 *
 * usage: bandwidth N_THREADS BYTES_PER_THREAD PASSES
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { kMaxThreads = 1024, kLanes = 64 };

struct job {
  uint64_t* data;
  size_t n_words;
  int n_passes;
  pthread_barrier_t* barrier;
  double best_seconds;
  uint64_t sum; /* printed, so that the reads cannot be dropped */
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t read_all(const uint64_t* data, size_t n_words) {
  uint64_t lane[kLanes] = {0};
  for (size_t i = 0; i + kLanes <= n_words; i += kLanes)
    for (int j = 0; j < kLanes; j++) lane[j] += data[i + j];
  uint64_t sum = 0;
  for (int j = 0; j < kLanes; j++) sum += lane[j];
  return sum;
}

static void* run(void* argument) {
  struct job* job = argument;
  for (size_t i = 0; i < job->n_words; i++)
    job->data[i] = i; /* first touch by the reading thread */
  for (int pass = 0; pass < job->n_passes; pass++) {
    pthread_barrier_wait(job->barrier);
    const double start = now();
    job->sum += read_all(job->data, job->n_words);
    pthread_barrier_wait(job->barrier);
    const double seconds = now() - start;
    if (pass == 0 || seconds < job->best_seconds) job->best_seconds = seconds;
  }
  return NULL;
}

int main(int argc, char** argv) {
  const int n_threads = argc > 1 ? atoi(argv[1]) : 1;
  const size_t n_bytes = argc > 2 ? strtoull(argv[2], NULL, 10) : (size_t)256 << 20;
  const int n_passes = argc > 3 ? atoi(argv[3]) : 8;
  if (n_threads < 1 || n_threads > kMaxThreads || n_bytes < 4096 || n_passes < 1) return 2;

  static struct job jobs[kMaxThreads];
  static pthread_t threads[kMaxThreads];
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, NULL, (unsigned)n_threads);
  for (int i = 0; i < n_threads; i++) {
    void* data = NULL;
    if (posix_memalign(&data, 4096, n_bytes) != 0) return 3;
    jobs[i] = (struct job){data, n_bytes / sizeof(uint64_t), n_passes, &barrier, 0.0, 0};
    if (pthread_create(&threads[i], NULL, run, &jobs[i]) != 0) return 3;
  }
  double slowest = 0.0;
  uint64_t sum = 0;
  for (int i = 0; i < n_threads; i++) {
    pthread_join(threads[i], NULL);
    if (jobs[i].best_seconds > slowest) slowest = jobs[i].best_seconds;
    sum += jobs[i].sum;
  }
  printf("%.0f %llu\n", (double)n_bytes * n_threads / slowest, (unsigned long long)sum);
  return 0;
}
