//! What is wrong with a daemon, from its status.

use serde_json::Value;

use super::{items, state, text};

/// Returns what an operator should look at, in words.
pub(super) fn problems(status: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    if status["ready"] != true {
        problems.push("the daemon is not ready".to_owned());
    }
    for pod in items(&status["pods"]) {
        if pod["enrolled"] != true || pod["tampered"].is_string() {
            problems.push(format!("pod {}: {}", text(&pod["pod"]), state(pod)));
        }
    }
    let now = text(&status["time"]);
    for certificate in items(&status["certificates"]) {
        let identity = text(&certificate["identity"]);
        match certificate["notAfter"].as_str() {
            None => problems.push(format!("{identity} has no certificate")),
            // Both are UTC in the format of RFC 3339, of which the first 19 characters are the seconds.
            Some(end) if end.get(..19) < now.get(..19) => {
                problems.push(format!("the certificate of {identity} expired at {end}"));
            }
            Some(_) => {}
        }
    }
    let ca = &status["ca"];
    if ca["reachable"] == false {
        problems.push(format!(
            "the CA has not answered since {}: {}",
            text(&ca["answered"]),
            text(&ca["lastError"])
        ));
    }
    for domain in items(&status["federation"]) {
        if let Some(error) = domain["error"].as_str() {
            problems.push(format!(
                "the bundle of {} is not current: {}",
                text(&domain["trustDomain"]),
                error.replace(char::is_control, " ")
            ));
        }
    }
    for cluster in items(&status["remoteClusters"]) {
        if let Some(error) = cluster["error"].as_str() {
            problems.push(format!(
                "remote cluster {} has been unreadable since {}: {}",
                text(&cluster["name"]),
                text(&cluster["since"]),
                error.replace(char::is_control, " ")
            ));
        }
        if cluster["trusted"] == false {
            problems.push(format!(
                "remote cluster {} is of trust domain {}, which has no federation entry",
                text(&cluster["name"]),
                text(&cluster["trustDomain"])
            ));
        }
    }
    for policy in items(&status["policies"]) {
        if let Some(error) = policy["error"].as_str() {
            let (kind, name) = (text(&policy["kind"]), text(&policy["name"]));
            problems.push(format!(
                "{kind} {name}: {}",
                error.replace(char::is_control, " ")
            ));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_what_is_wrong_and_nothing_else() {
        let mut status = json!({
            "ready": true, "time": "2026-01-02T03:04:05.006Z",
            "pods": [{"pod": "a/b", "enrolled": true, "reason": ""}],
            "certificates": [{"identity": "spiffe://x", "notAfter": "2026-01-02T03:04:05Z"}],
            "ca": {"reachable": true, "answered": null, "lastError": "once"},
            "federation": [{"trustDomain": "partner.example", "error": null}],
            "remoteClusters": [{"name": "east", "error": null, "since": null, "trusted": true}],
            "policies": [{"kind": "AuthorizationPolicy", "name": "a/p", "error": null}],
        });
        assert!(problems(&status).is_empty());
        status["ready"] = false.into();
        status["pods"][0]["tampered"] = "route".into();
        status["certificates"][0]["notAfter"] = "2026-01-02T03:04:04Z".into();
        status["ca"]["reachable"] = false.into();
        status["federation"][0]["error"] = "no answer".into();
        status["remoteClusters"][0] = json!({
            "name": "east", "trustDomain": "east.example", "error": "no route", "since": "2026-01-02T03:04:05Z",
            "trusted": false,
        });
        status["policies"][0]["error"] = "spec: bad".into();
        assert_eq!(
            problems(&status),
            [
                "the daemon is not ready",
                "pod a/b: enrolled; TAMPERED: route",
                "the certificate of spiffe://x expired at 2026-01-02T03:04:04Z",
                "the CA has not answered since -: once",
                "the bundle of partner.example is not current: no answer",
                "remote cluster east has been unreadable since 2026-01-02T03:04:05Z: no route",
                "remote cluster east is of trust domain east.example, which has no federation entry",
                "AuthorizationPolicy a/p: spec: bad",
            ]
        );
    }
}
