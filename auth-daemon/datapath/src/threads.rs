//! The priority of threads.

use std::io;

/// Nice value of a preferred thread: the kernel gives it some ten times the CPU time of one with the usual value, and runs it
/// sooner when it wakes up (sched(7)).
const PREFERRED: libc::c_int = -10;

/// Has the kernel prefer the calling thread to the others of the same cgroup.
///
/// # Errors
/// If the process may not: it lacks CAP_SYS_NICE.
pub fn prefer() -> io::Result<()> {
    // SAFETY: no memory is passed. On Linux, 0 is the calling thread, and the call changes no other (setpriority(2)).
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, PREFERRED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
