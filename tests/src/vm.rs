//! What `cargo xtask vm-test` and `vm-guest`, the first program of its virtual machines, say to each other: a [`Plan`]
//! as a file of the guest's, and [`Event`]s as lines of JSON on its second serial line.

use std::env;

use serde::{Deserialize, Serialize};

/// Where the guest finds its plan.
pub const PLAN: &str = "/etc/vm-plan.json";
/// Where the guest writes its events; the kernel's own messages go to the first line.
pub const EVENTS: &str = "/dev/ttyS1";

/// A variable of the tests in a machine whose processor is emulated.
pub const EMULATED: &str = "MESH_EMULATED";

/// Whether this machine's processor is emulated, so that what needs its speed cannot be shown. Says that `test` is skipped
/// then.
pub fn skipped_when_emulated(test: &str) -> bool {
    let emulated = env::var_os(EMULATED).is_some();
    if emulated {
        println!("SKIPPED {test}: it needs a processor's own speed, and this one is emulated");
    }
    emulated
}

/// What a guest is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Programs to run.
    pub steps: Vec<Step>,
}

/// One program and how it is run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What it is called in reports.
    pub name: String,
    /// What /sys/fs/cgroup is to look like.
    pub cgroups: Cgroups,
    /// The program's path and its arguments.
    pub command: Vec<String>,
    /// Variables, beside the guest's own.
    pub environment: Vec<(String, String)>,
    /// After so many seconds it is killed.
    pub seconds: u64,
}

/// How cgroups are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cgroups {
    /// Version 2 alone, on /sys/fs/cgroup: what distributions have set up since 2021.
    V2,
    /// The controllers of version 1 below /sys/fs/cgroup, and version 2, without any, on /sys/fs/cgroup/unified.
    Both,
}

/// What a guest reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// It has started, with this kernel (`uname -r`).
    Started(String),
    /// A step begins: its index.
    Begins(usize),
    /// The program of this step has written a line, to standard output or error.
    Line(String),
    /// It has ended.
    Ended {
        /// Its exit code; none after a signal.
        code: Option<i32>,
        /// It did not end in its time, and was killed.
        late: bool,
    },
    /// The guest itself cannot go on; it powers off.
    Trouble(String),
    /// All steps were run; it powers off.
    Done,
}
