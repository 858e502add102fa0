module github.com/decuwatch/decuwatch

go 1.26.8
