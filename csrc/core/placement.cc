#include "core/placement.h"

namespace fastrnn {

#if defined(__linux__)

int this_processor() { return sched_getcpu(); }

cpu_set_t free_processors(const cpu_set_t& allowed, const cpu_set_t& taken, int last) {
  cpu_set_t both;
  cpu_set_t free;
  CPU_AND(&both, &allowed, &taken);
  CPU_XOR(&free, &allowed, &both);
  if (CPU_COUNT(&free) == 0) return allowed;
  const bool may_stay = last >= 0 && last < CPU_SETSIZE && CPU_ISSET(last, &free);
  if (may_stay) return free;
  // Its own processor is taken: the next free one after it, so that threads that were all on one
  // spread.
  int processor = last < 0 ? 0 : last % CPU_SETSIZE;
  while (!CPU_ISSET(processor, &free)) processor = (processor + 1) % CPU_SETSIZE;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(processor, &one);
  return one;
}

#else

int this_processor() { return -1; }

#endif

}  // namespace fastrnn
