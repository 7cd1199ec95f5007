// The last line of a process that dies of a signal: what its last step ran. Then whoever was asked to hear of the
// signal before (Python's faulthandler, which prints the stacks) hears of it, and the process ends as it would have.
#include <csignal>
#include <cstring>
#include <unistd.h>

namespace {

struct Fatal {
  int number;
  const char* name;
  struct sigaction before;
};
Fatal fatal[] = {{SIGSEGV, "SIGSEGV", {}}, {SIGBUS, "SIGBUS", {}}, {SIGILL, "SIGILL", {}}, {SIGFPE, "SIGFPE", {}},
                 {SIGABRT, "SIGABRT", {}}};
const char* words = nullptr;

// Only what may be called in a signal's handler: write, sigaction, raise.
void say(const char* text) {
  for (size_t left = strlen(text); left;) {
    const ssize_t written = write(STDERR_FILENO, text, left);
    if (written <= 0) return;
    text += written;
    left -= static_cast<size_t>(written);
  }
}

void die(int number) {
  for (Fatal& one : fatal) {
    if (one.number != number) continue;
    say("the process ends: ");
    say(one.name);
    say(" in native code; the last step ran ");
    say(words);
    say("\n");
    sigaction(number, &one.before, nullptr);
  }
  raise(number);
}

}  // namespace

// `text` is what to say, read when the time has come: it has to stay, and to have a NUL in it at every moment.
extern "C" void loramux_crash_report(const char* text) {
  const bool first = words == nullptr;
  words = text;
  if (!first) return;
  struct sigaction action = {};
  action.sa_handler = die;
  action.sa_flags = SA_NODEFER | SA_ONSTACK;  // the one before is called while this one runs
  for (Fatal& one : fatal) sigaction(one.number, &action, &one.before);
}
