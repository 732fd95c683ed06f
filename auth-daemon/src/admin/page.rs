//! The page that shows the mesh in a browser: its files, its headers, and the hosts that it may be asked under.

use std::net::IpAddr;

use axum::{
    Router,
    extract::Request,
    http::{
        HeaderName, HeaderValue, StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
        },
        uri::Authority,
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};

/// Path, media type and text of each file.
const FILES: [(&str, &str, &str); 14] = [
    ("/", HTML, include_str!("page/index.html")),
    ("/ui/style.css", CSS, include_str!("page/style.css")),
    ("/ui/icon.svg", SVG, include_str!("page/icon.svg")),
    ("/ui/main.js", SCRIPT, include_str!("page/main.js")),
    ("/ui/source.js", SCRIPT, include_str!("page/source.js")),
    ("/ui/mesh.js", SCRIPT, include_str!("page/mesh.js")),
    ("/ui/graph.js", SCRIPT, include_str!("page/graph.js")),
    ("/ui/layout.js", SCRIPT, include_str!("page/layout.js")),
    ("/ui/map.js", SCRIPT, include_str!("page/map.js")),
    ("/ui/table.js", SCRIPT, include_str!("page/table.js")),
    ("/ui/details.js", SCRIPT, include_str!("page/details.js")),
    ("/ui/notices.js", SCRIPT, include_str!("page/notices.js")),
    ("/ui/format.js", SCRIPT, include_str!("page/format.js")),
    ("/ui/dom.js", SCRIPT, include_str!("page/dom.js")),
];
const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SVG: &str = "image/svg+xml";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Headers of every response. The page needs nothing but its own files and data, and turns no text into markup.
const HEADERS: [(HeaderName, &str); 7] = [
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-store"),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
];

const OTHER_HOST: &str = "This server answers as localhost only, so that no other site can read it through a browser \
                          (DNS rebinding). Use http://localhost with its port.\n";

/// Serves the page beside `data`, under a loopback address or the name localhost only.
pub(crate) fn with_page(data: Router) -> Router {
    let files = FILES.iter().fold(data, |routes, (path, kind, text)| {
        routes.route(path, get(([(CONTENT_TYPE, *kind)], *text)))
    });
    files.layer(middleware::from_fn(guard))
}

async fn guard(request: Request, next: Next) -> Response {
    let mut response = match is_local(request.headers().get(HOST)) {
        true => next.run(request).await,
        false => (StatusCode::MISDIRECTED_REQUEST, OTHER_HOST).into_response(),
    };
    for (name, value) in HEADERS {
        let value = HeaderValue::from_static(value);
        response.headers_mut().insert(name, value);
    }
    response
}

/// Whether a browser that sends this Host header was given a loopback address or localhost to go to.
fn is_local(host: Option<&HeaderValue>) -> bool {
    let authority = host
        .and_then(|host| host.to_str().ok())
        .and_then(|host| host.parse::<Authority>().ok());
    authority.is_some_and(|authority| {
        let host = authority.host().trim_matches(['[', ']']);
        host.eq_ignore_ascii_case("localhost")
            || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    })
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use tower::ServiceExt;

    use super::*;

    async fn ask(path: &str, host: &str) -> Response {
        let data = Router::new().route("/nodes", get(async || "secret"));
        let request = Request::builder().uri(path).header(HOST, host);
        let request = request.body(Body::empty()).unwrap();
        with_page(data).oneshot(request).await.unwrap()
    }

    #[tokio::test]
    async fn answers_under_local_names_only() {
        for host in ["localhost:15000", "LOCALHOST", "127.0.0.1:1", "[::1]:15000"] {
            assert_eq!(ask("/nodes", host).await.status(), 200, "{host}");
        }
        for host in [
            "rebound.example",
            "localhost.example:15000",
            "10.0.0.1:15000",
            "[fd00::1]",
            "",
            "a b",
        ] {
            let answer = ask("/nodes", host).await;
            assert_eq!(answer.status(), StatusCode::MISDIRECTED_REQUEST, "{host}");
            let body = to_bytes(answer.into_body(), 1000).await.unwrap();
            assert_eq!(body, OTHER_HOST);
        }
    }

    #[tokio::test]
    async fn every_answer_has_the_headers() {
        for (path, host) in [("/", "localhost"), ("/nodes", "localhost"), ("/", "x")] {
            let answer = ask(path, host).await;
            for (name, value) in HEADERS {
                assert_eq!(answer.headers()[&name], value, "{path} at {host}: {name}");
            }
        }
    }

    /// The page's policy forbids inline code, so a file with some would not work in a browser.
    #[test]
    fn files_refer_to_each_other_and_to_nothing_else() {
        let paths: Vec<_> = FILES.iter().map(|(path, ..)| *path).collect();
        for (path, kind, text) in FILES {
            assert!(!text.contains("innerHTML"), "{path}");
            for word in text.split(['"', '\'', ' ', '(', ')', '\n']) {
                let is_namespace = word == "http://www.w3.org/2000/svg";
                let is_link = word.contains("://") && !is_namespace;
                assert!(!is_link, "{path} names another host: {word}");
                if kind == SCRIPT && word.starts_with("./") && word.ends_with(".js") {
                    let file = format!("/ui{}", &word[1..]);
                    assert!(paths.contains(&file.as_str()), "{path} imports {word}");
                }
            }
        }
        let page = FILES[0].2;
        let mut words = page.split_whitespace();
        let is_handler = |word: &str| word.starts_with("on") && word.contains('=');
        assert!(!page.contains("style=") && !page.contains("<style") && !words.any(is_handler));
        assert_eq!(
            page.matches("<script").count(),
            page.matches("src=").count()
        );
    }
}
