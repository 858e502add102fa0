package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// States of an evidence job.
const (
	EvidencePending = "pending"
	EvidenceDone    = "done"
	EvidenceFailed  = "failed"
)

// EvidenceJob is evidence that is owed to a review.
type EvidenceJob struct {
	ReviewID string
	Attempt  int           // this one, from 1
	Score    *schema.Score // nil if retention dropped it
}

// EvidenceFile is one file of a review's evidence.
type EvidenceFile struct {
	Name        string // image-0, image-1, ...; map; numbers
	ContentType string // image/png or application/json
	Body        []byte // at most 1 MiB
	MadeAt      time.Time
}

// NextEvidence leases the oldest job that is due on one of the ensembles. It returns false if no job is due. The
// attempt counts from here on: if its worker dies, the job is due again when the lease ends.
func (s *Store) NextEvidence(
	ctx context.Context, ensembleDigests []string, lease time.Duration,
) (job EvidenceJob, found bool, err error) {
	e := eventRow{Outcome: schema.OutcomeScore}
	err = s.pool.QueryRow(ctx, takeEvidenceJob, notNil(ensembleDigests), lease).Scan(
		&job.ReviewID, &job.Attempt, &e.Source, &e.EventID, &e.Model, &e.EventTime, &e.EnsembleDigest)
	if errors.Is(err, pgx.ErrNoRows) {
		return job, false, nil
	}
	if err != nil {
		return job, false, fmt.Errorf("take an evidence job: %w", err)
	}
	r, err := s.standing(ctx, e)
	if err != nil {
		return job, true, fmt.Errorf("read the score of evidence job %s: %w", job.ReviewID, err)
	}
	job.Score = r.Score
	return job, true, nil
}

// StoreEvidence stores the files that a job's attempt made, and ends the job. It returns false, and stores nothing,
// if the lease has ended and another attempt took the job or finished it.
func (s *Store) StoreEvidence(ctx context.Context, job EvidenceJob, files []EvidenceFile) (bool, error) {
	stored := false
	err := s.begin(ctx, "store evidence of "+job.ReviewID, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, finishEvidenceJob, job.ReviewID, job.Attempt)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		stored = true
		b := &batch{}
		for _, f := range files {
			b.Queue(insertEvidence, job.ReviewID, f.Name, f.ContentType, f.Body)
		}
		b.notify(ChannelReviews)
		return b.send(ctx, tx)
	})
	return stored && err == nil, err
}

// FailEvidence records why an attempt failed. The job is due again after the wait, or failed for good if final is set.
func (s *Store) FailEvidence(
	ctx context.Context, job EvidenceJob, reason string, wait time.Duration, final bool,
) error {
	state := EvidencePending
	if final {
		state = EvidenceFailed
	}
	_, err := s.pool.Exec(ctx, failEvidenceJob, job.ReviewID, job.Attempt, state, clean(reason), wait)
	if err != nil {
		return fmt.Errorf("record failed evidence of %s: %w", job.ReviewID, err)
	}
	return nil
}

// ReturnEvidence gives back a job that its worker did not finish. It is due again at once, and the attempt does not
// count.
func (s *Store) ReturnEvidence(ctx context.Context, job EvidenceJob) error {
	_, err := s.pool.Exec(ctx, returnEvidenceJob, job.ReviewID, job.Attempt)
	if err != nil {
		return fmt.Errorf("return evidence job %s: %w", job.ReviewID, err)
	}
	return nil
}

// RetryEvidence makes a job that failed for good due again, from its first attempt. The error is ErrNotFound if no
// failed job of the review exists.
func (s *Store) RetryEvidence(ctx context.Context, reviewID string) error {
	tag, err := s.pool.Exec(ctx, retryEvidenceJob, reviewID)
	if err != nil {
		return fmt.Errorf("retry evidence of %s: %w", reviewID, err)
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("failed evidence of review %s: %w", reviewID, ErrNotFound)
	}
	return nil
}

// EvidenceFiles returns the files of a review in order of name, without their bodies.
func (s *Store) EvidenceFiles(ctx context.Context, reviewID string) ([]EvidenceFile, error) {
	files, err := list(ctx, s.pool, pgx.RowToStructByPos[EvidenceFile], evidenceFiles, reviewID)
	if err != nil {
		return nil, fmt.Errorf("read evidence of %s: %w", reviewID, err)
	}
	return files, nil
}

// EvidenceFile returns one file. The error is ErrNotFound if it does not exist.
func (s *Store) EvidenceFile(ctx context.Context, reviewID, name string) (EvidenceFile, error) {
	f := EvidenceFile{Name: name}
	err := s.pool.QueryRow(ctx, evidenceFile, clean(reviewID), clean(name)).
		Scan(&f.ContentType, &f.Body, &f.MadeAt)
	if errors.Is(err, pgx.ErrNoRows) {
		return f, fmt.Errorf("evidence %s of %s: %w", name, reviewID, ErrNotFound)
	}
	if err != nil {
		return f, fmt.Errorf("read evidence of %s: %w", reviewID, err)
	}
	return f, nil
}

// EvidenceStats counts jobs that are not done.
type EvidenceStats struct {
	Pending int
	Failed  int
	Oldest  time.Duration // since the oldest pending job's review was opened; 0 if no job is pending
}

// EvidenceStats returns how many jobs are not done.
func (s *Store) EvidenceStats(ctx context.Context) (EvidenceStats, error) {
	var e EvidenceStats
	err := s.pool.QueryRow(ctx, evidenceStats).Scan(&e.Pending, &e.Failed, &e.Oldest)
	if err != nil {
		return e, fmt.Errorf("count evidence jobs: %w", err)
	}
	return e, nil
}
