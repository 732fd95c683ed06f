//! `auth-daemon policy`: explains which connections the policies allow and why, based on the state of the node's daemon
//! or on a folder of manifests. For people at a terminal, and for pipelines that must reject a change.

use std::{net::IpAddr, process::ExitCode};

use anyhow::{Context, anyhow};
use clap::Subcommand;

use super::{
    daemons::{Daemons, Selection},
    manifests::Manifests,
    policy_diff, policy_suggest,
};
use auth_mesh::policy::question::{Answer, Question};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Explain whether a call is allowed, by which rule, and why the other policies do not match. Exit code 0: allowed,
    /// 1: denied, 2: unknown. With --diff, compare two sets of policies instead. Exit code 0: everything that is allowed
    /// stays allowed, 1: connections would end or be refused, 2: unknown.
    Check(CheckArguments),
    /// List the policies, with the pods that each selects and any errors. Exit code 2 if a policy cannot be read.
    List(ListArguments),
    /// Suggest policies that allow the connections seen since the daemons started, and nothing else, as YAML with the
    /// evidence as comments. Exit code 2 if connections may be missing.
    Suggest(policy_suggest::Arguments),
}

#[derive(Debug, clap::Args)]
struct CheckArguments {
    /// The caller: a SPIFFE ID, or a pod as NAMESPACE/NAME.
    #[arg(long, required_unless_present = "diff")]
    from: Option<String>,
    /// The server: a pod or service as NAMESPACE/NAME[:PORT]. If a pod and a service have the same name, use
    /// pod/NAMESPACE/NAME or service/NAMESPACE/NAME. A service stands for each of its pods.
    #[arg(long, required_unless_present = "diff")]
    to: Option<String>,
    /// Source address of the call, instead of the pod's own.
    #[arg(long)]
    source_ip: Option<IpAddr>,
    #[command(flatten)]
    diff: policy_diff::Arguments,
    #[command(flatten)]
    manifests: Manifests,
    #[command(flatten)]
    daemons: Selection,
}

#[derive(Debug, clap::Args)]
struct ListArguments {
    #[command(flatten)]
    manifests: Manifests,
    #[command(flatten)]
    daemons: Selection,
}

/// Exit code if it cannot be determined whether the call is allowed.
const UNKNOWN: u8 = 2;
const DENIED: u8 = 1;

pub(super) fn policy(arguments: &Arguments) -> ExitCode {
    let (answer, bad) = match &arguments.command {
        Command::Check(arguments) => match arguments.diff.sides() {
            Some(sides) => {
                let (manifests, daemons) = (&arguments.manifests, &arguments.daemons);
                (arguments.diff.compare(sides, manifests, daemons), DENIED)
            }
            None => (check(arguments), DENIED),
        },
        Command::List(arguments) => (list(arguments), UNKNOWN),
        Command::Suggest(arguments) => (policy_suggest::answer(arguments), UNKNOWN),
    };
    match answer {
        Ok(answer) => {
            print!("{}", answer.text);
            for warning in answer.warnings {
                eprintln!("warning: {warning}");
            }
            if answer.good { 0 } else { bad }.into()
        }
        Err(error) => {
            eprintln!("auth-daemon: {error:#}");
            UNKNOWN.into()
        }
    }
}

fn check(arguments: &CheckArguments) -> anyhow::Result<Answer> {
    let question = Question {
        from: arguments.from.clone().unwrap_or_default(),
        to: arguments.to.clone().unwrap_or_default(),
        source_ip: arguments.source_ip,
    };
    match &arguments.manifests.files {
        Some(path) => arguments.manifests.read(path)?.check(&question),
        None => query("check", &question, &arguments.daemons),
    }
}

fn list(arguments: &ListArguments) -> anyhow::Result<Answer> {
    match &arguments.manifests.files {
        Some(path) => Ok(arguments.manifests.read(path)?.list()),
        None => query("list", &(), &arguments.daemons),
    }
}

/// Queries a daemon: all know the same.
fn query(
    what: &str,
    question: &impl serde::Serialize,
    daemons: &Selection,
) -> anyhow::Result<Answer> {
    let answer: Result<Answer, String> = Daemons::find(daemons)?
        .ask_any(&format!("/policy/{what}"), Some(question))
        .context("with --files, a folder of manifests is used instead of a daemon")?;
    answer.map_err(|error| anyhow!(error))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cli::manifests::DefaultMode;

    const MESH: &str = "
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: web-1, namespace: shop, labels: {app: web}},
   spec: {serviceAccountName: web, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]},
   status: {podIP: 10.0.0.1}}
- {apiVersion: v1, kind: Pod, metadata: {name: web-2, namespace: shop, labels: {app: web, canary: 'yes'}},
   spec: {serviceAccountName: web, containers: [{name: c, ports: [{name: http, containerPort: 8081}]}]},
   status: {podIP: 10.0.0.2}}
- {apiVersion: v1, kind: Pod, metadata: {name: front, namespace: shop},
   spec: {serviceAccountName: front, containers: []}, status: {podIP: 10.0.0.3}}
- {apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
   spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: http}]}}
";
    const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, rules: [{from: [{source: {serviceAccounts: [front]}}]}]}
";

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new(policies: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("mesh.yaml"), MESH).unwrap();
            fs::write(folder.path().join("policies.yml"), policies).unwrap();
            fs::write(folder.path().join(".hidden.yaml"), "{").unwrap();
            Self(folder)
        }

        fn manifests(&self) -> Manifests {
            Manifests {
                files: Some(self.0.path().to_owned()),
                trust_domain: "cluster.local".into(),
                trust_domain_aliases: Vec::new(),
                foreign_trust_domains: Vec::new(),
                root_namespace: "istio-system".into(),
                mode: DefaultMode::Strict,
            }
        }

        fn listed(&self) -> ListArguments {
            ListArguments {
                manifests: self.manifests(),
                daemons: Selection::default(),
            }
        }

        fn check(&self, from: &str, to: &str) -> Result<(String, bool), String> {
            let arguments = CheckArguments {
                from: Some(from.into()),
                to: Some(to.into()),
                source_ip: None,
                diff: policy_diff::Arguments::default(),
                manifests: self.manifests(),
                daemons: Selection::default(),
            };
            check(&arguments)
                .map(|answer| (answer.text, answer.good))
                .map_err(|error| format!("{error:#}"))
        }
    }

    #[test]
    fn allowed_and_denied_with_the_rule_and_the_reasons() {
        let folder = Folder::new(POLICY);
        let (text, allowed) = folder.check("shop/front", "shop/web-1:8080").unwrap();
        assert!(allowed, "{text}");
        assert_eq!(
            text,
            "shop/front (spiffe://cluster.local/ns/shop/sa/front) at 10.0.0.3 to shop/web-1 at 10.0.0.1:8080:\n\
             allowed by AuthorizationPolicy shop/web rules[0]\n\
             mutual TLS: STRICT by the mesh's default\n  \
             AuthorizationPolicy shop/web (ALLOW): rules[0] matches\n"
        );
        let (text, allowed) = folder
            .check("spiffe://cluster.local/ns/a/sa/b", "shop/web")
            .unwrap();
        assert!(!allowed, "{text}");
        assert_eq!(
            text,
            "spiffe://cluster.local/ns/a/sa/b to shop/web-1 at 10.0.0.1:8080, and 1 more:\n\
             denied: no rule matches of AuthorizationPolicy shop/web\n\
             mutual TLS: STRICT by the mesh's default\n  \
             AuthorizationPolicy shop/web (ALLOW): does not match\n    \
             rules[0]: from: service account /ns/a/sa/b is not listed\n"
        );
    }

    #[test]
    fn a_service_is_each_of_its_pods_at_its_own_port() {
        let folder = Folder::new(&format!(
            "{POLICY}---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: canary, namespace: shop}}\n\
             spec: {{action: DENY, selector: {{matchLabels: {{canary: 'yes'}}}}, \
             rules: [{{to: [{{operation: {{ports: ['8081']}}}}]}}]}}\n"
        ));
        let (text, allowed) = folder.check("shop/front", "shop/web:80").unwrap();
        assert!(!allowed);
        assert!(
            text.contains("to shop/web-1 at 10.0.0.1:8080:\nallowed by"),
            "{text}"
        );
        let denied =
            "to shop/web-2 at 10.0.0.2:8081:\ndenied by AuthorizationPolicy shop/canary rules[0]";
        assert!(text.contains(denied), "{text}");
        assert!(
            text.contains("does not select the workload: it selects canary=yes"),
            "{text}"
        );
    }

    #[test]
    fn undecidable_calls_are_errors_that_name_what_is_missing() {
        let folder = Folder::new(POLICY);
        for (from, to, expected) in [
            (
                "front",
                "shop/web",
                "--from \"front\": is not NAMESPACE/NAME",
            ),
            (
                "spiffe://x",
                "shop/web",
                "--from \"spiffe://x\": path is not",
            ),
            ("shop/back", "shop/web", "has no pod shop/back"),
            ("shop/front", "shop/db", "has no pod or service shop/db"),
            (
                "shop/front",
                "shop/web:81",
                "service shop/web has no TCP port 81",
            ),
            ("shop/front", "shop/web:http", "\"http\" is not a port"),
            ("shop/web-1", "shop/front", "add the port"),
            ("shop/front", "pod/shop/web", "has no pod shop/web"),
        ] {
            let error = folder.check(from, to).unwrap_err();
            assert!(error.contains(expected), "{from} {to}: {error}");
        }
        let by_address = POLICY.replace("serviceAccounts: [front]", "ipBlocks: [10.0.0.3]");
        let folder = Folder::new(&by_address);
        let error = folder
            .check("spiffe://cluster.local/ns/a/sa/b", "shop/web")
            .unwrap_err();
        assert!(error.contains("--source-ip"), "{error}");
        assert!(
            folder
                .check("spiffe://cluster.local/ns/shop/sa/front", "shop/web")
                .unwrap()
                .1
        );

        let folder = Folder::new("apiVersion: v1\nkind: Pod\nmetadata: {name: 5}\n");
        let error = folder.check("shop/front", "shop/web").unwrap_err();
        assert!(error.contains("policies.yml: Pod"), "{error}");
        let folder = Folder::new(&format!("{POLICY}---\n{POLICY}"));
        let error = folder.check("shop/front", "shop/web").unwrap_err();
        assert!(
            error.contains("AuthorizationPolicy shop/web is defined a second time"),
            "{error}"
        );
    }

    #[test]
    fn lists_what_is_in_force_and_what_is_refused() {
        let folder = Folder::new(POLICY);
        let Answer {
            text,
            good,
            warnings,
        } = list(&folder.listed()).unwrap();
        assert!(good && warnings.is_empty());
        assert_eq!(
            text,
            "KIND                 NAME      DOES   SELECTOR  PODS  RULES\n\
             AuthorizationPolicy  shop/web  ALLOW  app=web   2     1\n"
        );
        let folder = Folder::new(&POLICY.replace("serviceAccounts", "ipBlocks"));
        let Answer {
            text,
            good,
            warnings,
        } = list(&folder.listed()).unwrap();
        assert!(!good);
        assert!(text.contains("REFUSED"), "{text}");
        let warning = "AuthorizationPolicy shop/web: spec.rules[0].from[0].source.ipBlocks[0]: \"front\" is \
                       not an IP address; it allows no connection instead";
        let file = folder.0.path().join("policies.yml");
        assert_eq!(warnings, [format!("{}: {warning}", file.display())]);
        assert!(!folder.check("shop/front", "shop/web").unwrap().1);
    }
}
