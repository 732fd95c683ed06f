//! The priority of threads.

use std::io;

/// Nice value of a preferred thread: the kernel gives it some ten times the CPU time of one with the usual value, and runs it
/// sooner when it wakes up (sched(7)).
const NICE: i32 = -10;
/// Time slice of a preferred thread, in nanoseconds: the shortest that there is. From Linux 6.12 on, a thread that wakes up
/// interrupts one with a longer slice, and others only at the end of theirs, up to a timer tick later. Before, it is ignored.
const SLICE: u64 = 100_000;

/// Has the kernel prefer the calling thread to the others of the same cgroup, or treat it as any other.
///
/// # Errors
/// If the process may not: it lacks CAP_SYS_NICE.
pub fn set_preferred(is_preferred: bool) -> io::Result<()> {
    let (nice, slice) = if is_preferred { (NICE, SLICE) } else { (0, 0) };
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: 0,
        // 0 is the kernel's default.
        sched_runtime: slice,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel reads the attributes, which are valid during the call. 0 is the calling thread
    // (sched_setattr(2)).
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
