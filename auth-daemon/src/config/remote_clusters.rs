//! The section `discovery.kubernetes.remoteClusters`.

use std::{collections::BTreeMap, str::FromStr};

use super::kubernetes_namespace;
use auth_mesh::{ClusterName, TrustDomain};
use auth_support::config::Section;

/// Remote clusters on the same network, whose pods and services are merged into those of the daemon's cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteClusters {
    /// The namespace of the Secrets with their kubeconfigs. Not the daemon's own, because there are the CA's keys.
    pub namespace: String,
    /// Trust domains of the clusters that have another than the mesh.
    pub trust_domains: BTreeMap<ClusterName, TrustDomain>,
}

impl RemoteClusters {
    /// Takes the fields from `section`. `own_namespace` is the daemon's.
    pub(super) fn read(
        section: &mut Section,
        own_namespace: Option<&str>,
        errors: &mut Vec<String>,
    ) -> Option<Self> {
        let namespace = section.required("namespace", errors, |name| {
            if own_namespace == Some(name) {
                return Err(
                    "is the daemon's own: a daemon that reads its Secrets reads the CA's keys; use a namespace for remote \
                     secrets alone",
                );
            }
            kubernetes_namespace(name)
        });
        let mut trust_domains = BTreeMap::new();
        for mut entry in section.sections("trustDomains", errors) {
            let cluster = entry.required("cluster", errors, |name| {
                let cluster = ClusterName::from_str(name)?;
                match trust_domains.contains_key(&cluster) {
                    true => Err("is in another entry, too"),
                    false => Ok(cluster),
                }
            });
            let trust_domain = entry.required("trustDomain", errors, TrustDomain::from_str);
            entry.refuse_the_rest(errors);
            if let (Some(cluster), Some(trust_domain)) = (cluster, trust_domain) {
                trust_domains.insert(cluster, trust_domain);
            }
        }
        Some(Self {
            namespace: namespace?,
            trust_domains,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<RemoteClusters, String> {
        let mut errors = Vec::new();
        let text = format!("remoteClusters: {text}\n");
        let mut root = Section::of_yaml(&text, &mut errors).unwrap();
        let mut section = root.section("remoteClusters", &mut errors);
        let read = RemoteClusters::read(&mut section, Some("auth-system"), &mut errors);
        section.refuse_the_rest(&mut errors);
        match errors.is_empty() {
            true => Ok(read.unwrap()),
            false => Err(errors.join("\n")),
        }
    }

    #[test]
    fn reads_every_field() {
        let small = read("{namespace: remote}").unwrap();
        assert_eq!(small.namespace, "remote");
        assert!(small.trust_domains.is_empty());
        let domains =
            "{cluster: gke_x_1, trustDomain: far.example}, {cluster: b, trustDomain: own.example}";
        let read = read(&format!("{{namespace: remote, trustDomains: [{domains}]}}")).unwrap();
        let shown: Vec<_> = { read.trust_domains.iter() }
            .map(|(cluster, domain)| format!("{cluster} {domain}"))
            .collect();
        assert_eq!(shown, ["b own.example", "gke_x_1 far.example"]);
    }

    #[test]
    fn names_every_error() {
        for (text, expected) in [
            ("{}", "remoteClusters.namespace: is missing"),
            ("{namespace: auth-system}", "reads the CA's keys"),
            ("{namespace: A}", "is not the name of a namespace"),
            (
                "{namespace: x, secrets: y}",
                "remoteClusters.secrets: there is no such field",
            ),
            (
                "{namespace: x, trustDomains: [{cluster: a/b, trustDomain: far.example}]}",
                "trustDomains[0].cluster: \"a/b\": is not the name of a cluster",
            ),
            (
                "{namespace: x, trustDomains: [{cluster: a, trustDomain: far.example}, {cluster: a}]}",
                "trustDomains[1].cluster: \"a\": is in another entry",
            ),
        ] {
            let errors = read(text).unwrap_err();
            assert!(errors.contains(expected), "{text}: {errors}");
        }
    }
}
