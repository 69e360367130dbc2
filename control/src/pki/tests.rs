use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn names(list: &[&str]) -> Vec<ServerName> {
    list.iter().map(|name| ServerName::parse(name)).collect()
}

#[test]
fn a_second_start_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (config, agent) = (
        dir.path().join("etc/admin.kubeconfig"),
        dir.path().join("agent"),
    );
    let start = || {
        let authority = Authority::open(dir.path()).unwrap();
        let server = authority
            .server(&names(&["localhost", "127.0.0.1"]))
            .unwrap();
        authority
            .ensure_kubeconfig(&config, "https://127.0.0.1:6443")
            .unwrap();
        authority.ensure_agent(&agent, "a").unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        (
            authority.certificate().to_owned(),
            server.certificate,
            read(&config),
            read(&agent.join("client.crt")),
        )
    };
    let first = start();
    assert!(first == start());
    for path in [
        dir.path().join("pki/ca.key"),
        dir.path().join("pki/server.key"),
        config,
        agent.join("client.key"),
    ] {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[test]
fn a_new_name_a_new_address_or_a_new_node_makes_new_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path()).unwrap();
    let server = |list: &[&str]| authority.server(&names(list)).unwrap().certificate;
    let first = server(&["localhost", "10.0.0.1"]);
    // Fewer names need no new certificate.
    assert_eq!(first, server(&["localhost"]));
    assert_ne!(first, server(&["localhost", "10.0.0.2"]));

    let config = dir.path().join("kubeconfig");
    let read = || std::fs::read_to_string(&config).unwrap();
    authority.ensure_kubeconfig(&config, "https://a:1").unwrap();
    let first = read();
    authority.ensure_kubeconfig(&config, "https://b:1").unwrap();
    assert_ne!(first, read());

    let agent = dir.path().join("agent");
    authority.ensure_agent(&agent, "a").unwrap();
    authority.ensure_agent(&agent, "b").unwrap();
    let certificate = std::fs::read_to_string(agent.join("client.crt")).unwrap();
    assert_eq!(common_name(&certificate).as_deref(), Some("system:node:b"));
}

#[test]
fn credentials_of_another_ca_are_replaced() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, two) = (one.path(), two.path());
    let first = Authority::open(one)
        .unwrap()
        .server(&names(&["localhost"]))
        .unwrap();
    let other = Authority::open(two).unwrap();
    std::fs::copy(one.join("pki/server.crt"), two.join("pki/server.crt")).unwrap();
    std::fs::copy(one.join("pki/server.key"), two.join("pki/server.key")).unwrap();
    let replaced = other.server(&names(&["localhost"])).unwrap();
    assert!(first != replaced);
    assert!(
        other
            .reason_to_renew(&replaced, &names(&["localhost"]))
            .is_none()
    );
}

#[test]
fn half_an_authority_is_not_replaced_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    Authority::open(dir.path()).unwrap();
    std::fs::remove_file(dir.path().join("pki/ca.key")).unwrap();
    let error = Authority::open(dir.path()).err().unwrap().to_string();
    assert!(error.contains("ca.key is missing"), "{error}");
    std::fs::write(dir.path().join("pki/ca.key"), "rubbish").unwrap();
    let error = Authority::open(dir.path()).err().unwrap().to_string();
    assert!(error.contains("not a private key"), "{error}");
}

#[test]
fn clients_carry_user_and_group() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path()).unwrap();
    let made = authority.client("system:node:a", NODES_GROUP, 1).unwrap();
    let identity =
        crate::server::identity::Identity::from_certificate(&der_of(&made.certificate).unwrap());
    let identity = identity.unwrap();
    assert_eq!(identity.node_name(), Some("a"));
    assert!(!identity.is_master());
}

#[test]
fn credentials_near_their_end_are_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path()).unwrap();
    let reason = |days| {
        let made = authority.client("x", MASTERS_GROUP, days).unwrap();
        authority.reason_to_renew(&made, &[])
    };
    assert_eq!(reason(LEAF_DAYS), None);
    assert!(reason(RENEW_DAYS - 1).unwrap().starts_with("it ends at"));
    assert!(reason(-1).is_some());
}
