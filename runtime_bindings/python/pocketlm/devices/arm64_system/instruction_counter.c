/* A plugin of QEMU's TCG that counts a guest's instructions in the windows that the guest itself marks.
 *
 *   cc -shared -fPIC -O2 -nostdlib -o instruction_counter.so instruction_counter.c
 *   qemu-aarch64 -plugin ./instruction_counter.so,out=FILE PROGRAM
 *
 * A mark is the system call getpriority(PRIO_PROCESS, 0x504B0000 + n): it closes the open window and opens window n, or
 * none for 0. Each window that is closed becomes a line of FILE: its number, the instructions in it, and how many
 * threads the guest had at most while it was open. Only with one thread is the count exact: all of them add to it.
 *
 * The interface is that of docs/devel/tcg-plugins.rst, version 1, declared here because distributions ship no header.
 * Nothing else is linked to, so that the file loads whatever C library the emulator runs with.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE_ADD 0    /* QEMU_PLUGIN_INLINE_ADD_U64 */
#define GETPRIORITY 141 /* of arm64 */
#define MARK 0x504Bu    /* the upper half of the second argument */

typedef uint64_t plugin_id;
struct translation_block;

extern void qemu_plugin_register_vcpu_init_cb(plugin_id, void (*)(plugin_id, unsigned));
extern void qemu_plugin_register_vcpu_exit_cb(plugin_id, void (*)(plugin_id, unsigned));
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct translation_block*));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct translation_block*, int, void*, uint64_t);
extern size_t qemu_plugin_tb_n_insns(const struct translation_block*);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id,
                                                 void (*)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t,
                                                          uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));

EXPORT int qemu_plugin_version = 1;

static uint64_t executed;  /* by all threads, since the start */
static uint64_t opened_at; /* `executed` when the window was opened */
static unsigned window;    /* 0: none is open */
static int threads, most_threads;
static int output;

static void thread_begins(plugin_id id, unsigned cpu) {
  int now = __atomic_add_fetch(&threads, 1, __ATOMIC_SEQ_CST);
  if (now > most_threads) most_threads = now;
}

static void thread_ends(plugin_id id, unsigned cpu) { __atomic_sub_fetch(&threads, 1, __ATOMIC_SEQ_CST); }

static void translated(plugin_id id, struct translation_block* block) {
  qemu_plugin_register_vcpu_tb_exec_inline(block, INLINE_ADD, &executed, qemu_plugin_tb_n_insns(block));
}

static void system_call(plugin_id id, unsigned cpu, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                        uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  if (number != GETPRIORITY || b >> 16 != MARK) return;
  if (window) {
    char line[64];
    int length = snprintf(line, sizeof line, "%u %" PRIu64 " %d\n", window, executed - opened_at, most_threads);
    if (write(output, line, (size_t)length) != length)
      _exit(125); /* a count that is lost must not look like a run that counted */
  }
  window = (unsigned)(b & 0xFFFF);
  most_threads = threads;
  opened_at = executed;
}

EXPORT int qemu_plugin_install(plugin_id id, const void* information, int count, char** arguments) {
  if (count != 1 || strncmp(arguments[0], "out=", 4) != 0) return -1;
  output = open(arguments[0] + 4, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (output < 0) return -1;
  qemu_plugin_register_vcpu_init_cb(id, thread_begins);
  qemu_plugin_register_vcpu_exit_cb(id, thread_ends);
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, system_call);
  return 0;
}
