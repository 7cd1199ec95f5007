// Prints what the last step ran if a signal kills the process, then calls the previous signal handler (Python's
// faulthandler, which prints the stacks).
#include <csignal>
#include <cstring>
#include <unistd.h>

namespace {

struct FatalSignal {
  int number;
  const char* name;
  struct sigaction previous;
};
FatalSignal fatal_signals[] = {{SIGSEGV, "SIGSEGV", {}},
                               {SIGBUS, "SIGBUS", {}},
                               {SIGILL, "SIGILL", {}},
                               {SIGFPE, "SIGFPE", {}},
                               {SIGABRT, "SIGABRT", {}}};
const char* report = nullptr;

// Async-signal-safe functions only: write, sigaction, raise.
void write_text(const char* text) {
  for (size_t left = strlen(text); left;) {
    const ssize_t written = write(STDERR_FILENO, text, left);
    if (written <= 0) return;
    text += written;
    left -= static_cast<size_t>(written);
  }
}

void handle_signal(int number) {
  for (FatalSignal& fatal : fatal_signals) {
    if (fatal.number != number) continue;
    write_text("the process ends: ");
    write_text(fatal.name);
    write_text(" in native code; the last step ran ");
    write_text(report);
    write_text("\n");
    sigaction(number, &fatal.previous, nullptr);
  }
  raise(number);
}

}  // namespace

// `text` is read when the signal arrives. It must stay valid and always contain a NUL.
extern "C" void loramux_crash_report(const char* text) {
  const bool first = report == nullptr;
  report = text;
  if (!first) return;
  struct sigaction action = {};
  action.sa_handler = handle_signal;
  action.sa_flags = SA_NODEFER | SA_ONSTACK;  // the previous handler runs inside this one
  for (FatalSignal& fatal : fatal_signals) sigaction(fatal.number, &action, &fatal.previous);
}
