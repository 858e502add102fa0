SELECT coalesce(sum(octet_length(payload)), 0) FROM decuwatch.dead_letters
WHERE recorded_at > now() - interval '1 hour' AND kind NOT IN ('failed', 'given_up', 'orphaned')
    AND payload_state <> 'expired' AND octet_length(payload) > $1
