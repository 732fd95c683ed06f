//! Checks each of the daemon's requirements on the machine, for `auth-daemon check`.

use std::{fs, path::Path};

use nix::sys::utsname::uname;

use super::{kernel::try_load, mounts, netns::Netns, plumbing};

/// A requirement, and whether this machine meets it.
#[derive(Debug, serde::Serialize)]
pub struct Finding {
    /// Name of the requirement.
    pub name: &'static str,
    /// Whether it is met.
    pub ok: bool,
    /// What was found, and what to do if the requirement is not met.
    pub detail: String,
}

/// Oldest kernel version with every feature. Distributions backport some of them, so loading the programs is the more
/// reliable check.
const OLDEST: (u32, u32) = (5, 17);

/// Capabilities that the daemon uses, by number (capability.h).
const CAPABILITIES: [(u32, &str, &str); 5] = [
    (12, "CAP_NET_ADMIN", "routes in pods, transparent sockets"),
    (
        10,
        "CAP_NET_BIND_SERVICE",
        "clients' source ports below 1024",
    ),
    (
        21,
        "CAP_SYS_ADMIN",
        "loading and attaching programs, entering pods' namespaces",
    ),
    (23, "CAP_SYS_NICE", "precedence of threads for quiet pods"),
    (
        19,
        "CAP_SYS_PTRACE",
        "finding pods' namespaces through /proc",
    ),
];

/// Runs all checks that do not change the machine.
pub fn check(cgroup: Option<&Path>, pins: &Path) -> Vec<Finding> {
    vec![
        kernel_version(),
        capabilities(),
        outcome(
            "cgroup v2",
            mounts::cgroup_root(cgroup).map(|path| path.display().to_string()),
        ),
        bpffs(pins),
        outcome(
            "netns cookies",
            Netns::open(Path::new("/proc/self/ns/net"))
                .map(|netns| format!("this namespace's is {}", netns.cookie()))
                .map_err(|error| anyhow::anyhow!("{error}: SO_NETNS_COOKIE came with Linux 5.14")),
        ),
        outcome(
            "marks of accepted connections",
            fs::metadata("/proc/sys/net/ipv4/tcp_fwmark_accept")
                .and(fs::metadata("/proc/sys/net/ipv4/fwmark_reflect"))
                .map(|_| "net.ipv4.tcp_fwmark_accept and fwmark_reflect are present".to_owned())
                .map_err(|error| {
                    anyhow::anyhow!("net.ipv4.tcp_fwmark_accept, fwmark_reflect: {error}")
                }),
        ),
        outcome(
            "policy routing",
            plumbing::list_rules()
                .map(|()| "IPv4 and IPv6 have route rules".to_owned())
                .map_err(|error| {
                    anyhow::anyhow!(
                        "{error}; it needs CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES"
                    )
                }),
        ),
        programs(),
    ]
}

fn programs() -> Finding {
    let refused = try_load();
    Finding {
        name: "eBPF programs",
        ok: refused.is_empty(),
        detail: if refused.is_empty() {
            "connect, getpeername, getsockname, sock_create, sockops, sk_lookup and tc load and verify"
                .to_owned()
        } else {
            let refused: Vec<_> = refused
                .iter()
                .map(|error| ends(&with_causes(error)))
                .collect();
            refused.join("; ")
        },
    }
}

/// Returns the first and the last line of a verifier log. The lines between them trace the verifier's whole path.
fn ends(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    // The verifier's statistics follow its last error.
    let work = ["processed ", "stack depth ", "verification time "];
    match lines.rfind(|line| !work.iter().any(|word| line.starts_with(word))) {
        Some(last) => format!("{first} … {last}"),
        None => first.to_owned(),
    }
}

fn kernel_version() -> Finding {
    let (release, version) = release();
    Finding {
        name: "kernel",
        ok: version >= OLDEST,
        detail: if version >= OLDEST {
            release
        } else {
            format!(
                "{release} is too old: ingress_ifindex in sk_lookup came with Linux {}.{}; upgrade the node",
                OLDEST.0, OLDEST.1
            )
        },
    }
}

/// The kernel's version.
pub(super) fn version() -> (u32, u32) {
    release().1
}

fn release() -> (String, (u32, u32)) {
    let release = uname().map(|name| name.release().to_string_lossy().into_owned());
    let release = release.unwrap_or_default();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (release, version)
}

/// Checks that this process has the required capabilities.
pub fn capabilities() -> Finding {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(bit, ..)| effective & (1 << bit) == 0)
        .map(|(_, name, purpose)| format!("{name} ({purpose})"))
        .collect();
    Finding {
        name: "capabilities",
        ok: missing.is_empty(),
        detail: if missing.is_empty() {
            "all present".into()
        } else {
            format!(
                "missing: {}; run as root, or add them to the container",
                missing.join(", ")
            )
        },
    }
}

fn bpffs(pins: &Path) -> Finding {
    let there = mounts::is_bpffs(pins);
    let ours = pins.starts_with("/sys/fs/bpf");
    Finding {
        name: "bpf file system",
        ok: there || ours,
        detail: match (there, ours) {
            (true, _) => format!("{} is on one", pins.display()),
            (false, true) => "none on /sys/fs/bpf yet; the daemon mounts it".into(),
            (false, false) => format!("{} is not on one; mount one there", pins.display()),
        },
    }
}

fn outcome(name: &'static str, result: anyhow::Result<String>) -> Finding {
    match result {
        Ok(detail) => Finding {
            name,
            ok: true,
            detail,
        },
        Err(error) => Finding {
            name,
            ok: false,
            detail: format!("{error:#}"),
        },
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_ends_of_a_verifier_log_are_shown() {
        let story = "refused: Verifier output: 0: (bf) r6 = r1\n1: (61) r1 = *(u32 *)(r6 +64)\n\
            invalid bpf_context access off=64 size=4\nprocessed 2 insns (limit 1000000)\nstack depth 0+0\n\n";
        assert_eq!(
            ends(story),
            "refused: Verifier output: 0: (bf) r6 = r1 … invalid bpf_context access off=64 size=4"
        );
        assert_eq!(ends("one line"), "one line");
    }
}
