//! Identifies the pod of a process by its cgroup.
//!
//! With every container runtime and cgroup driver, the kubelet names a pod's cgroup after the pod's UID, and all
//! processes of the pod are in that cgroup or below it. A pod can neither choose that name nor move its processes to
//! another pod's cgroup. A user who owns a cgroup, as systemd gives one to each login, can choose any name for cgroups
//! below it. /proc/PID/cgroup is therefore trustworthy only for a cgroup that, like all of its ancestors, belongs to
//! the node: one that was found from the hierarchy's root on (`cgroup_folders`), or whose path was checked
//! (`hierarchies`).

use std::{collections::HashSet, fmt, str::FromStr};

/// The identifier in the name of a pod's cgroup: the UID from the API server, or, for a static pod, the hash of its
/// manifest (`kubernetes.io/config.hash` on its mirror pod).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid {
    bits: u128,
    /// Whether it is a hash. A hash is written without dashes, and never equals a UID with the same digits.
    is_hash: bool,
}

/// The text does not identify a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is neither a UUID nor a static pod's hash of 32 hexadecimal digits")]
pub struct NoPodUid;

impl PodUid {
    /// Parses a UUID (RFC 9562 §4) with `dash` between its parts, or 32 hexadecimal digits.
    fn parse(text: &str, dash: u8) -> Option<Self> {
        let is_hash = text.len() == 32;
        if !is_hash && text.len() != 36 {
            return None;
        }
        let mut bits = 0;
        for (place, byte) in text.bytes().enumerate() {
            if !is_hash && matches!(place, 8 | 13 | 18 | 23) {
                if byte != dash {
                    return None;
                }
            } else {
                bits = bits << 4 | u128::from(char::from(byte).to_digit(16)?);
            }
        }
        Some(Self { bits, is_hash })
    }

    /// Returns the pod of a cgroup with this name: `pod<uid>` (cgroupfs), or a slice whose last part is that, with `_`
    /// in the UID because `-` separates slices (systemd). A runtime that receives the name of a slice but does not
    /// support slices creates `<slice>:<prefix>:<container>`.
    pub(super) fn of_cgroup(name: &str) -> Option<Self> {
        let slice = name.split_once(':').map_or(name, |(slice, _)| slice);
        let (name, dash) = match slice.strip_suffix(".slice") {
            Some(slices) => (slices.rsplit('-').next()?, b'_'),
            None => (name, b'-'),
        };
        Self::parse(name.strip_prefix("pod")?, dash)
    }
}

impl FromStr for PodUid {
    type Err = NoPodUid;

    fn from_str(text: &str) -> Result<Self, NoPodUid> {
        Self::parse(text, b'-').ok_or(NoPodUid)
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", self.bits);
        if self.is_hash {
            return f.write_str(&digits);
        }
        let [a, b, c, d] = [0..8, 8..12, 12..16, 16..20].map(|part| &digits[part]);
        write!(f, "{a}-{b}-{c}-{d}-{}", &digits[20..])
    }
}

/// All pods at any level of the cgroup paths in this /proc/PID/cgroup.
pub(super) fn pods_around(cgroups: &str) -> HashSet<PodUid> {
    paths(cgroups)
        .flat_map(|path| path.split('/').filter_map(PodUid::of_cgroup))
        .collect()
}

/// Returns the pod of a process with this /proc/PID/cgroup, and the name of its container's cgroup. The name is empty
/// if the process is in the pod's own cgroup.
///
/// `around` contains the pods that the node itself runs in, as a node of kind does. Of all other pods the outermost
/// counts, because cgroups below it were created by a process in that pod. If the hierarchies (cgroup v1) of a process
/// name different pods, it belongs to none.
pub(super) fn container<'a>(
    cgroups: &'a str,
    around: &HashSet<PodUid>,
) -> Option<(PodUid, &'a str)> {
    let mut found: Option<(PodUid, &str)> = None;
    for path in paths(cgroups) {
        let mut names = path.split('/');
        let pod = names.by_ref().find_map(|name| {
            let pod = PodUid::of_cgroup(name)?;
            (!around.contains(&pod)).then_some((pod, name))
        });
        let Some((pod, name)) = pod else {
            continue;
        };
        match found {
            Some((other, _)) if other != pod => return None,
            Some(_) => {}
            None if name.contains(':') => found = Some((pod, name)),
            None => found = Some((pod, names.next().unwrap_or_default())),
        }
    }
    found
}

/// Extracts the paths from the `hierarchy:controllers:path` lines of cgroups(7).
fn paths(cgroups: &str) -> impl Iterator<Item = &str> {
    cgroups
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "0b1c2d3e-4f50-4a6b-8c7d-9e0f1a2b3c4d";
    const OTHER: &str = "11111111-2222-4333-8444-555555555555";
    const HASH: &str = "8f3e2d1c0b9a87654321fedcba098765";

    fn uid(text: &str) -> PodUid {
        text.parse().unwrap()
    }

    fn whose(cgroups: &str) -> Option<(PodUid, &str)> {
        container(cgroups, &HashSet::new())
    }

    #[test]
    fn knows_the_layouts_of_runtimes_and_drivers() {
        let slice = UID.replace('-', "_");
        let id = "7c1fe4b0a6f8d2e35b9a8c4d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f";
        for (cgroups, name) in [
            // cgroup v2, systemd driver: containerd, CRI-O, cri-dockerd; burstable, besteffort, guaranteed.
            (
                format!(
                    "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice/cri-containerd-{id}.scope\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            (
                format!(
                    "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/crio-{id}.scope/container\n"
                ),
                format!("crio-{id}.scope"),
            ),
            (
                format!("0::/kubepods.slice/kubepods-pod{slice}.slice/docker-{id}.scope\n"),
                format!("docker-{id}.scope"),
            ),
            // systemd inside the container.
            (
                format!(
                    "0::/kubepods.slice/kubepods-pod{slice}.slice/crio-{id}.scope/init.scope\n"
                ),
                format!("crio-{id}.scope"),
            ),
            // cgroupfs driver.
            (
                format!("0::/kubepods/burstable/pod{UID}/{id}\n"),
                id.to_owned(),
            ),
            (format!("0::/kubepods/pod{UID}\n"), String::new()),
            // kubelet --cgroup-root.
            (
                format!("0::/custom/kubepods/besteffort/pod{UID}/{id}\n"),
                id.to_owned(),
            ),
            // kind, with both drivers.
            (
                format!(
                    "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{slice}.slice/cri-containerd-{id}.scope\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            (
                format!("0::/docker/{id}/kubelet/kubepods/besteffort/pod{UID}/{id}\n"),
                id.to_owned(),
            ),
            (
                format!("0::/docker/{id}/kubepods/besteffort/pod{UID}/{id}\n"),
                id.to_owned(),
            ),
            // Seen from a nested cgroup namespace (cgroup_namespaces(7)).
            (
                format!(
                    "0::/../../kubelet-kubepods-burstable-pod{slice}.slice/cri-containerd-{id}.scope\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            (
                format!(
                    "0::/../../kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{slice}.slice/cri-containerd-{id}.scope\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            (format!("0::/../../pod{UID}/{id}\n"), id.to_owned()),
            // cgroup v1, and hybrid mode. Some hierarchies have no cgroups for pods.
            (
                format!(
                    "12:rdma:/\n11:memory:/kubepods/burstable/pod{UID}/{id}\n10:cpu,cpuacct:/kubepods/burstable/pod{UID}/{id}\n1:name=systemd:/kubepods/burstable/pod{UID}/{id}\n0::/system.slice/containerd.service\n"
                ),
                id.to_owned(),
            ),
            (
                format!(
                    "5:devices:/kubepods.slice/kubepods-pod{slice}.slice/cri-containerd-{id}.scope\n1:name=systemd:/kubepods.slice/kubepods-pod{slice}.slice/cri-containerd-{id}.scope\n0::/\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            // The kubelet uses the systemd driver, the runtime does not.
            (
                format!(
                    "0::/system.slice/containerd.service/kubepods-burstable-pod{slice}.slice:cri-containerd:{id}\n"
                ),
                format!("kubepods-burstable-pod{slice}.slice:cri-containerd:{id}"),
            ),
            // The process's cgroup is already deleted.
            (
                format!("0::/kubepods/pod{UID}/{id} (deleted)\n"),
                format!("{id} (deleted)"),
            ),
        ] {
            let found = whose(&cgroups);
            assert_eq!(found, Some((uid(UID), name.as_str())), "{cgroups}");
        }
        let static_pod = format!("0::/kubepods/burstable/pod{HASH}/{id}\n");
        assert_eq!(whose(&static_pod), Some((uid(HASH), id)));
        let static_slice = format!("0::/kubepods.slice/kubepods-burstable-pod{HASH}.slice/x.scope");
        assert_eq!(whose(&static_slice), Some((uid(HASH), "x.scope")));
    }

    #[test]
    fn what_is_no_pods_is_nobodys() {
        let slice = UID.replace('-', "_");
        for cgroups in [
            "",
            "0::/\n",
            "0::/system.slice/containerd.service\n",
            "0::/kubepods.slice/kubepods-burstable.slice\n",
            "0::/podruntime.slice/kubelet.service\n",
            "0::/machine.slice/podman-1234.scope\n",
            "0::/user.slice/user-libpod_pod_8f3e2d1c0b9a87654321fedcba098765.slice\n",
            "nothing of the kind",
            &format!("0::/kubepods/{UID}/x"),
            &format!("0::/kubepods/pod{UID}0/x"),
            &format!("0::/kubepods/pod{slice}/x"),
            &format!("0::/kubepods-pod{UID}.slice/x"),
            &format!("0::/kubepods/xpod{UID}/x"),
            &format!("0::/kubepods/pod{}/x", &UID[1..]),
            &format!("0::/kubepods/pod{}g/x", &UID[1..]),
            &format!("pod{UID}"),
            // Different pods in different hierarchies.
            &format!("2:cpu:/kubepods/pod{UID}/x\n1:memory:/kubepods/pod{OTHER}/x\n"),
        ] {
            assert_eq!(whose(cgroups), None, "{cgroups}");
        }
    }

    #[test]
    fn a_pod_that_makes_cgroups_of_its_own_takes_nobodys_name() {
        let nested = format!("0::/kubepods/pod{UID}/a/docker/b/kubepods/pod{OTHER}/c\n");
        assert_eq!(whose(&nested), Some((uid(UID), "a")));
    }

    #[test]
    fn a_node_in_a_pod_has_pods_of_its_own() {
        let outer = format!("1:memory:/kubepods/pod{UID}/a/docker/b");
        let around = pods_around(&format!("{outer}/init.scope\n"));
        assert_eq!(around, HashSet::from([uid(UID)]));
        let inner = format!("{outer}/kubelet/kubepods/pod{OTHER}/c\n");
        assert_eq!(container(&inner, &around), Some((uid(OTHER), "c")));
        assert_eq!(container(&outer, &around), None);
    }

    #[test]
    fn a_hash_is_not_the_uid_of_the_same_digits() {
        let (with, without) = (uid(UID), uid(&UID.replace('-', "")));
        assert_ne!(with, without);
        assert_eq!(with.to_string(), UID);
        assert_eq!(without.to_string(), UID.replace('-', ""));
        assert_eq!("u1".parse::<PodUid>(), Err(NoPodUid));
        assert_eq!(
            "é".repeat(18).parse::<PodUid>(),
            Err(NoPodUid),
            "36 bytes, none a digit"
        );
    }

    proptest! {
        #[test]
        fn anything_may_stand_in_a_cgroup(cgroups in any::<String>()) {
            let _ = whose(&cgroups);
            let _ = pods_around(&cgroups);
        }

        #[test]
        fn uids_are_read_as_they_are_written(bits: u128, is_hash: bool) {
            let uid = PodUid { bits, is_hash };
            let text = uid.to_string();
            prop_assert_eq!(text.parse(), Ok(uid));
            let cgroupfs = format!("pod{text}");
            prop_assert_eq!(PodUid::of_cgroup(&cgroupfs), Some(uid));
            let slice = format!("kubelet-kubepods-burstable-pod{}.slice", text.replace('-', "_"));
            prop_assert_eq!(PodUid::of_cgroup(&slice), Some(uid));
        }

        /// For any location of the pod's cgroup, and any cgroups inside it.
        #[test]
        fn the_outermost_pod_counts(
            before in prop::collection::vec("[a-z.-]{1,9}|\\.\\.", 0..5),
            within in prop::collection::vec("[a-z.-]{1,9}", 0..3),
            hierarchies in 1..4_usize,
        ) {
            let path: String = before
                .iter()
                .chain([&format!("pod{UID}"), &"a:b".to_owned()])
                .chain(&within)
                .chain([&format!("pod{OTHER}")])
                .map(|name| format!("/{name}"))
                .collect();
            let cgroups: String = (0..hierarchies).map(|n| format!("{n}:c{n}:{path}\n")).collect();
            prop_assert_eq!(whose(&cgroups), Some((uid(UID), "a:b")));
        }
    }
}
