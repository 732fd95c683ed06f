//! The interface between `cargo xtask vm-test` and `vm-guest`, the init process of its virtual machines: a [`Plan`] as
//! a file in the guest, and [`Event`]s as lines of JSON on its second serial line.

use std::env;

use serde::{Deserialize, Serialize};

/// The path of the plan in the guest.
pub const PLAN: &str = "/etc/vm-plan.json";
/// The device to which the guest writes its events; the kernel's own messages go to the first serial line.
pub const EVENTS: &str = "/dev/ttyS1";

/// An environment variable that is set for tests in a machine with an emulated processor.
pub const EMULATED: &str = "MESH_EMULATED";

/// Whether this machine's processor is emulated, so that a test that needs its speed cannot run. If so, reports `test`
/// as skipped.
pub fn skipped_when_emulated(test: &str) -> bool {
    let emulated = env::var_os(EMULATED).is_some();
    if emulated {
        println!("SKIPPED {test}: it needs a processor's own speed, and this one is emulated");
    }
    emulated
}

/// What a guest does, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Programs to run.
    pub steps: Vec<Step>,
    /// Whether they run containers, whose root cannot replace the kernel's first root.
    pub containers: bool,
}

/// A program and how to run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Its name in reports.
    pub name: String,
    /// How /sys/fs/cgroup is mounted.
    pub cgroups: Cgroups,
    /// The program's path and its arguments.
    pub command: Vec<String>,
    /// Environment variables, in addition to the guest's own.
    pub environment: Vec<(String, String)>,
    /// Time limit in seconds, after which the program is killed.
    pub seconds: u64,
}

/// How cgroups are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cgroups {
    /// Version 2 only, on /sys/fs/cgroup: the default of distributions since 2021.
    V2,
    /// The version 1 controllers below /sys/fs/cgroup, and version 2, without controllers, on /sys/fs/cgroup/unified.
    Both,
}

/// An event that a guest reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The guest has started, with this kernel (`uname -r`).
    Started(String),
    /// The step of this index begins.
    Begins(usize),
    /// The program of this step has written a line to standard output or standard error.
    Line(String),
    /// The program of this step has exited.
    Ended {
        /// Its exit code; `None` if it was killed by a signal.
        code: Option<i32>,
        /// Whether it exceeded its time limit and was killed.
        late: bool,
    },
    /// The guest cannot continue because of this error; it powers off.
    Trouble(String),
    /// All steps have run; the guest powers off.
    Done,
}
